"""`chord-learner`: trains, serves leases and weights, and keeps the ledger."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from common.command import (
    CheckOption,
    ConfigOption,
    OverridesArgument,
    new_command,
    resolve_or_check,
    run_command,
    start_logging,
)
from common.config.schema import Config
from common.errors import OperatorError
from common.keys.folder import check_server_keys
from common.model_folder import require_model_folder
from common.run_dir import RunDir
from common.sinks import require_sinks
from learner.checkpoints import Checkpoints
from learner.courier.process import check_courier
from learner.launch import start_ranks

app = new_command("The learner of a CHORD run: trains on what actors send and on expert rows, and broadcasts weights.")


@app.command()
def learner(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    check: CheckOption = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Insist on a checkpoint to go on from (found ones are used anyway).")
    ] = False,
    rewind: Annotated[
        int | None,
        typer.Option(metavar="STEP", help="Take the run back to the checkpoint of this step (0: its begin) and stop."),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(metavar="RUN_DIR", help="Repeat a run from its ledger, compare it bit for bit, and stop."),
    ] = None,
    node_index: Annotated[
        int, typer.Option(metavar="N", help="Which of learner.num_nodes machines this is, from 0.")
    ] = 0,
) -> None:
    """Run the learner until learner.num_steps optimizer steps are done."""
    if replay:
        start_logging("replay")
        from learner.replay import Replay

        print(Replay(RunDir(replay)).run())
        return
    resolved = resolve_or_check(config, overrides, check=check).config
    run_dir = RunDir(Path(resolved.run.dir))
    if rewind is not None:
        from learner.rewind import rewind as rewind_run

        with run_dir.explains_bad_disk():
            print(rewind_run(resolved, run_dir, rewind))
        return
    with run_dir.explains_bad_disk():
        run_dir.require_own()
        _check_paths(resolved, resume=resume)
    num_ranks, num_started = resolved.learner.num_ranks, int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks > 1 and num_started == 1:
        start_ranks(resolved.learner, node_index, sys.argv[1:])
    if num_started != num_ranks:
        raise OperatorError(f"learner.num_ranks: got {num_ranks}, expected {num_started}, as WORLD_SIZE has it")
    start_logging("learner")
    from learner.conductor import Conductor

    with run_dir.explains_bad_disk():
        conductor = Conductor(resolved)
        try:
            conductor.run()
        finally:
            conductor.close()


def _check_paths(config: Config, *, resume: bool) -> None:
    """What can be known to be wrong before anything heavy is imported."""
    require_model_folder(config.model.path)
    check_server_keys(config.network.keys)
    require_sinks(config.run.sinks)
    check_courier(config)
    folder = RunDir(Path(config.run.dir)).checkpoints
    if resume and not (folder.is_dir() and Checkpoints(folder, keep=1).all()):
        raise OperatorError(f"--resume: {folder} holds no checkpoint, expected one")


def main() -> None:
    run_command("chord-learner", app)


if __name__ == "__main__":
    main()
