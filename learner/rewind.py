"""The rewind: takes a run back to an older checkpoint, on purpose; the next start goes on from there.

What came later stays in the ledger as dropped (`rolled_back`), and its prompts will be leased again.
"""

from common.config.schema import Config
from common.errors import OperatorError
from common.run_dir import RunDir
from learner.checkpoints import Checkpoints
from learner.excerpts.folder import ExcerptFolder
from learner.handover import CHOICE, Choice
from learner.ledger.ledger import Ledger
from learner.recorder import Recorder


def rewind(config: Config, run_dir: RunDir, step: int) -> str:
    """Returns what was done. Raises OperatorError where `step` has no good checkpoint, or a learner is running."""
    if not run_dir.ledger.exists():
        raise OperatorError(f"--rewind: {run_dir.path} holds no run, expected the run.dir of one")
    run_dir.lock()
    ledger = Ledger(
        run_dir.ledger,
        groups_per_step=config.learner.groups_per_step,
        max_staleness=config.algorithm.max_staleness,
    )
    checkpoints = Checkpoints(run_dir.checkpoints, keep=config.learner.keep_checkpoints)
    checkpoints.require(step)
    ledger.begin_rewind(step)  # cut short from here on, it must be done again
    checkpoints.rewind(step)
    if (choice := Choice.read(ledger.fact(CHOICE, ""))) and step < choice.step:
        ledger.set_fact(CHOICE, "")
    ExcerptFolder(run_dir.excerpts).rewind(step)
    num_dropped = ledger.rewind(step)
    Recorder(run_dir.path, ledger).restore()
    ledger.close()
    run_dir.forget_results()
    return (
        f"{run_dir.path} is back at step {step}: {num_dropped} later groups are dropped, their prompts will be leased "
        "again"
    )
