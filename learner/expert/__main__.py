"""`chord-expert`: fill, list, measure, verify and export the expert store."""

import json
from contextlib import closing
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from common.chat import ChatMessage
from common.command import CheckOption, ConfigOption, OverridesArgument, new_command, resolve_or_check, run_command
from learner.expert.imports import import_app, write_lines
from learner.expert.store import ExpertRow, ExpertStore, store_path

WRONG = 1
"""Exit code of `verify` where anything is wrong."""
app = new_command("Keep the expert rows of a run: the store at expert.path, or RUN_DIR/expert.sqlite.")
app.add_typer(import_app, name="import")


@app.command("list")
def list_rows(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    check: CheckOption = False,
    limit: Annotated[int, typer.Option(min=1, help="Rows at most.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, messages in full.")] = False,
) -> None:
    """Show rows in the order of their import."""
    with closing(_open(config, overrides, check=check)) as store:
        uses = store.use_counts()
        for row in store.rows(limit=limit):
            print(_as_json(row, uses[row.row_id]) if as_json else _as_text(row, uses[row.row_id]))
        if not as_json and len(uses) > limit:
            print(f"… {len(uses) - limit:,} more of {len(uses):,} rows")


@app.command()
def stats(overrides: OverridesArgument = None, config: ConfigOption = None, check: CheckOption = False) -> None:
    """Show how many rows there are, from where, how long, and how often they were used."""
    with closing(_open(config, overrides, check=check)) as store:
        numbers, fingerprint = store.stats(), store.fingerprint()
    print(f"rows         {numbers.num_rows:,}")
    for source, num_rows in numbers.rows_per_source.items():
        print(f"  {num_rows:>10,} from {source}")
    print(f"characters   {numbers.total_chars:,} in all, {numbers.mean_chars:,.1f} per row")
    print(f"uses         min {numbers.min_uses:,}, mean {numbers.mean_uses:,.2f}, max {numbers.max_uses:,} per row")
    print(f"never used   {numbers.num_never_used:,}")
    print(f"fingerprint  {fingerprint}")


@app.command()
def verify(overrides: OverridesArgument = None, config: ConfigOption = None, check: CheckOption = False) -> None:
    """Check the file and the content of every row; exit code 1 where anything is wrong."""
    with closing(_open(config, overrides, check=check)) as store:
        is_wrong = False
        for line in store.verify():
            print(line)
            is_wrong = True
        if is_wrong:
            raise typer.Exit(WRONG)
        print(f"{store.path}: {len(store.row_ids()):,} rows, nothing wrong")


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="Replaced where it exists.")],
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    check: CheckOption = False,
) -> None:
    """Write all rows as JSON lines that `import jsonl` reads back."""
    with closing(_open(config, overrides, check=check)) as store:
        rows = ({"messages": _messages(row), "source": row.source} for row in store.rows())
        num_rows = write_lines(file, (json.dumps(row, ensure_ascii=False) for row in rows))
    print(f"exported {num_rows:,} rows to {file}")


def _open(config: Path | None, overrides: list[str] | None, *, check: bool) -> ExpertStore:
    return ExpertStore(store_path(resolve_or_check(config, overrides, check=check).config))


def _messages(row: ExpertRow) -> list[dict[str, str]]:
    return [message.model_dump() for message in row.messages]


def _as_json(row: ExpertRow, num_uses: int) -> str:
    values = {"row_id": row.row_id, "source": row.source, "num_uses": num_uses, "messages": _messages(row)}
    return json.dumps(values, ensure_ascii=False)


def _as_text(row: ExpertRow, num_uses: int) -> str:
    question = next(message for message in row.messages if message.role == "user")
    return f"{row.row_id:>6}  {num_uses:>4} uses  {row.source}  {_short(question)} → {_short(row.messages[-1])}"


def _short(message: ChatMessage) -> str:
    text = " ".join(message.content.split())
    return text if len(text) <= 60 else text[:59] + "…"


def main() -> NoReturn:
    run_command("chord-expert", app)


if __name__ == "__main__":
    main()
