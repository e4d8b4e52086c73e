"""The replay: repeats a run from its ledger alone and compares every version with the one on record, bit for bit.

It takes the committed compositions in order, with the groups as they came, from the initial policy or from the oldest
checkpoint where earlier groups are no longer kept (see learner.keep_arrivals). On the same machine a CPU gives the same
bits, so a run that was killed and resumed is shown to equal the one that was not.
"""

import logging
import tempfile
from pathlib import Path

from common.chat import Chat
from common.config.load import resolve_config
from common.errors import ComponentFailure, OperatorError
from common.run_dir import RunDir
from common.weights.snapshot import write_snapshot
from learner.checkpoints import Checkpoint, Checkpoints
from learner.handover import CHOICE, Choice, require_kept_policy
from learner.ledger.database import Database
from learner.ledger.history import History
from learner.ranks import Ranks
from learner.step_rows import StepReader, open_experts
from learner.trainer import Trainer, prepare_device

log = logging.getLogger(__name__)


class Replay:
    """Reads a run directory; writes nothing into it."""

    def __init__(self, run_dir: RunDir) -> None:
        """Raises OperatorError where the folder holds no run that can be repeated."""
        if not run_dir.ledger.exists():
            raise OperatorError(f"--replay: {run_dir.path} holds no ledger, expected the run.dir of a run")
        self._config = resolve_config(run_dir.config).config
        if self._config.learner.num_ranks > 1:
            raise OperatorError("--replay: got a run with learner.num_ranks > 1, expected one rank")
        database = Database(run_dir.ledger, is_read_only=True)
        self._history = History(database)
        self._choice = Choice.read(database.fact(CHOICE))
        self._checkpoints = Checkpoints(run_dir.checkpoints, keep=self._config.learner.keep_checkpoints)
        chat = Chat(Path(self._config.model.path))
        self._reader = StepReader(self._config, self._history, open_experts(self._config, chat), chat)
        self._recorded = self._history.version_hashes()

    def run(self) -> str:
        """Repeat every step; returns what was found. Raises ComponentFailure at the first version that differs."""
        device = prepare_device(self._config)
        ranks = Ranks(device)
        trainer = Trainer(self._config, ranks, device)
        start = self._begin(trainer)
        num_compared, checked = 0, list[int]()
        saved = {checkpoint.step: checkpoint for checkpoint in self._checkpoints.all()}
        step = start
        while composition := self._history.batch(step):
            found = self._reader.read(composition)
            trainer.take(step, found.rows, mu=found.mu)
            step += 1
            if self._choice and step == self._choice.step:
                num_compared += self._hand_over(trainer, self._choice)
            else:
                num_compared += self._compare(trainer, step, self._recorded.get(step))
            if step in saved and self._compare_parameters(trainer, saved[step]):
                checked.append(step)
            log.info("step %d of %d: the same", step, self._history.num_batches())
        parameters_hash = trainer.parameters_hash()
        ranks.close()
        if step == start:
            raise OperatorError(
                f"--replay: nothing after step {start} is kept, expected groups that can be trained again; a run with "
                "learner.keep_arrivals = true can be repeated from its begin"
            )
        return (
            f"replayed steps {start + 1} to {step}: bit for bit, {num_compared} versions and the parameters of "
            f"checkpoints {checked} are those on record; parameters {parameters_hash}"
        )

    def _begin(self, trainer: Trainer) -> int:
        """Put the trainer where the kept groups begin; returns the optimizer steps completed there."""
        first = self._history.first_whole_step()
        if first == 0:
            return 0
        good = [one for one in self._checkpoints.all() if one.step >= first and self._checkpoints.damage(one) is None]
        if not good:
            raise OperatorError(
                f"--replay: the groups before step {first} are no longer kept, expected a checkpoint from there on; "
                "a run with learner.keep_arrivals = true can be repeated from its begin"
            )
        trainer.restore(good[0].path)
        return good[0].step

    def _hand_over(self, trainer: Trainer, choice: Choice) -> int:
        """Go on with the policy that the run went on with; the run may have ended before it was published anew."""
        num_compared = self._compare(trainer, choice.step, choice.hash)
        trainer.begin_anew(require_kept_policy(self._config, choice, self._history))
        if (recorded := self._recorded.get(choice.step)) != choice.hash:
            self._compare(trainer, choice.step, recorded)
        return num_compared

    def _compare(self, trainer: Trainer, step: int, recorded: str | None) -> int:
        if recorded is None:
            return 0
        with tempfile.TemporaryDirectory() as folder:
            snapshot = write_snapshot(
                trainer.published_tensors(),
                Path(folder) / "version.safetensors",
                run_id="replay",
                incarnation=0,
                step=step,
                chunk_bytes=self._config.network.chunk_bytes,
            )
        if snapshot.version.hash != recorded:
            raise ComponentFailure(f"version {step}: got hash {snapshot.version.hash}, expected {recorded} as recorded")
        return 1

    def _compare_parameters(self, trainer: Trainer, checkpoint: Checkpoint) -> bool:
        expected, got = self._checkpoints.parameters_hash(checkpoint), trainer.parameters_hash()
        if got != expected:
            raise ComponentFailure(
                f"parameters after step {checkpoint.step}: got {got}, expected {expected} as in {checkpoint.path}"
            )
        return True
