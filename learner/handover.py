"""The handover from supervised fine-tuning to the method's own schedule (SFT-then-RL): which policy goes on, and how.

It is as if one run had ended and another begun from its `final/`: the published weights go on, in their published
precision; the optimizer and the schedules of lr and μ begin anew; no prompt was leased before.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from common.config.schema import Config
from common.errors import OperatorError
from common.weights.snapshot import Snapshot, read_snapshot
from learner.durable import link_or_copy, sync
from learner.ledger.history import History
from learner.ledger.ledger import Ledger

log = logging.getLogger(__name__)

CHOICE = "handover"


def kept_policy(config: Config, step: int) -> Path:
    """Where version `step` is kept as long as it may go on; known to every rank."""
    return Path(config.run.dir) / "sft" / f"{step:08d}.safetensors"


@dataclass(frozen=True)
class Choice:
    """Which policy went on, as the ledger notes it."""

    step: int
    """Where supervised fine-tuning ended."""
    hash: str
    """Of the version that it ended with, and that was evaluated as version `step`."""
    chosen: int
    """The version whose weights went on, as version `step`."""
    chosen_hash: str = ""
    """Of the chosen version as it was kept: a replay may give it other bits. Choices of older runs lack it."""

    @classmethod
    def read(cls, noted: str | None) -> "Choice | None":
        return cls(**json.loads(noted)) if noted else None


def require_kept_policy(config: Config, choice: Choice, history: History) -> Path:
    """The file of the policy that goes on. Raises OperatorError where it is not the one that was chosen."""
    chosen = choice.chosen
    path, expected = kept_policy(config, chosen), {choice.chosen_hash}
    if not choice.chosen_hash:
        expected = {*history.replaced_hashes(chosen), history.version_hashes().get(chosen, "of no version")}
    try:
        snapshot = read_snapshot(path, run_id="", incarnation=0, step=chosen, chunk_bytes=config.network.chunk_bytes)
        found = snapshot.version.hash
    except FileNotFoundError:
        found = "no file"
    if found not in expected:
        raise OperatorError(
            f"{path}: got {found}, expected version {chosen} with hash {' or '.join(sorted(expected))}: restore "
            "run.dir, or go back before it with chord-learner --rewind"
        )
    return path


class Handover:
    """Keeps the policies that may go on, and chooses among them, once. Rank 0 only."""

    def __init__(self, config: Config, ledger: Ledger) -> None:
        self._config = config
        self._ledger = ledger

    def keep(self, snapshot: Snapshot) -> None:
        """Called with every version when it is written, before anybody else knows of it."""
        step, last = snapshot.version.step, self._config.sft_steps
        if not last or step > last or self.choice is not None or not (step == last or self._is_candidate(step)):
            return
        path = kept_policy(self._config, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        link_or_copy(snapshot.path, path)
        sync(path)
        sync(path.parent)
        self._forget_all_but({step, *self._may_win()})

    def _is_candidate(self, step: int) -> bool:
        is_best_wanted = self._config.algorithm.sft_ends_with == "best"
        # Not version 0: a run that goes on from there would have had no supervised phase.
        return is_best_wanted and step > 0 and step % self._config.eval.every_steps == 0

    @property
    def choice(self) -> Choice | None:
        """None until it has been made."""
        return Choice.read(self._ledger.fact(CHOICE, ""))

    def choose(self, last: Snapshot) -> int:
        """Decide, now that no evaluation is owed any more; of equally good ones the later goes on.

        Raises OperatorError where the best is wanted and none has been evaluated.
        """
        chosen, accuracies = last.version.step, self._accuracies()
        if self._config.algorithm.sft_ends_with == "best":
            if not accuracies:
                raise OperatorError(
                    f'algorithm.sft_ends_with: got "best", but no version up to {chosen} was evaluated within '
                    "learner.eval_timeout_s: expected an evaluator"
                )
            chosen = max(accuracies, key=lambda step: (accuracies[step], step))
            log.info("version %d goes on: its held-out accuracy of %.3f is the best", chosen, accuracies[chosen])
        hashes = self._ledger.history.version_hashes()
        choice = Choice(last.version.step, last.version.hash, chosen, hashes[chosen])
        self._ledger.set_fact(CHOICE, json.dumps(asdict(choice)))
        self._forget_all_but({chosen})
        return chosen

    def _accuracies(self) -> Mapping[int, float]:
        """Of the kept versions that have been evaluated, by the run's first task."""
        lines = reversed(self._ledger.account.evaluations())
        return {line["step"]: line["accuracy"] for line in lines if kept_policy(self._config, line["step"]).exists()}

    def _may_win(self) -> set[int]:
        """The best so far, and those whose evaluation is owed; whether the newest one's will be is not known yet."""
        owed = self._ledger.evaluations.owed()  # first: a result that comes between the two is in both
        accuracies = self._accuracies()
        best = sorted(accuracies, key=lambda step: (accuracies[step], step))[-1:]
        return {*owed, *best}

    def _kept(self) -> list[int]:
        return [int(path.stem) for path in kept_policy(self._config, 0).parent.glob("*.safetensors")]

    def _forget_all_but(self, steps: set[int]) -> None:
        for step in set(self._kept()) - steps:
            kept_policy(self._config, step).unlink()
