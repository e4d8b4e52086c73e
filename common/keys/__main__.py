"""`chord-keys`: makes key pairs and says whom the learner lets in."""

from pathlib import Path
from typing import Annotated

import typer

from common.command import new_command, run_command
from common.errors import OperatorError
from common.keys.folder import LEARNER, KeyFolder, check_name, read_public

app = new_command("CURVE keys of a run's learner, actors and evaluators; a running learner takes changes over at once.")

FolderArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder that network.keys names.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of an allowed key.")]
NamesArgument = Annotated[list[str], typer.Argument(metavar="NAME...", help=f"One pair each; {LEARNER} is its own.")]


@app.command()
def create(
    folder: FolderArgument,
    names: NamesArgument,
    allow: Annotated[bool, typer.Option(help="Let the new peers in; leave it out for keys made elsewhere.")] = True,
) -> None:
    """Make a pair for each NAME: NAME.secret (mode 0600) and NAME.public. Nothing is overwritten."""
    keys = KeyFolder(folder)
    for name in names:
        check_name(name)
    for name in names:
        keys.create(name)
        if allow and name != LEARNER:
            keys.allow(name, keys.public(name))
        print(f"{folder / name}.secret, {folder / name}.public" + (" (allowed)" * (allow and name != LEARNER)))


@app.command("allow")
def allow_(
    folder: FolderArgument,
    public_file: Annotated[Path, typer.Argument(metavar="NAME.public", help="A public key made elsewhere.")],
) -> None:
    """Let the holder of a public key in, under the name of its file."""
    KeyFolder(folder).allow(public_file.stem, read_public(public_file))
    print(f"{public_file.stem} is allowed")


@app.command()
def revoke(folder: FolderArgument, name: NameArgument) -> None:
    """Let a key in no more; its connections are closed."""
    KeyFolder(folder).revoke(name)
    print(f"{name} is no longer allowed")


@app.command("list")
def list_(folder: FolderArgument) -> None:
    """Names of the pairs that lie here and of the keys that are allowed."""
    if not folder.is_dir():
        raise OperatorError(f"{folder}: got no folder, expected one of keys (see chord-keys create)")
    keys = KeyFolder(folder)
    here, allowed = keys.names(), keys.allowed_names()
    for name in sorted({*here, *allowed}):
        print(f"{name}\t{'pair' if name in here else '-'}\t{'allowed' if name in allowed else '-'}")


def main() -> None:
    run_command("chord-keys", app)


if __name__ == "__main__":
    main()
