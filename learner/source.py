"""Where a step's rows come from: groups of the ledger, in lease order, and expert rows, drawn without replacement.

Consumes committed groups and the expert store; waits for actors, within a time limit that names them; is unblocked by
the inbox; produces a composition, committed before its step, and the rows of it. While a step is taken, the rows of the
next one are read: a batch is cut when its step begins, so the ledger is as it would be without, wherever a run ends.
"""

import time
from collections.abc import Callable, Sequence

from common.config.algorithm import StalenessPolicy
from common.config.schema import Config
from common.wait import Wait
from learner.expert.sampler import draw
from learner.expert.store import ExpertStore
from learner.ledger.history import Composition
from learner.ledger.leases import DropReason
from learner.ledger.ledger import Ledger
from learner.read_ahead import ReadAhead
from learner.schedule import mu_of
from learner.step_rows import StepReader, StepRows


class Stopped(Exception):
    """The run was asked to stop while it waited."""


class Source:
    """Composes steps. Rank 0 only."""

    def __init__(
        self, config: Config, ledger: Ledger, experts: ExpertStore | None, reader: StepReader, *,
        describe_peers: Callable[[], str], check: Callable[[], None],
    ) -> None:  # fmt: skip
        """`experts` is None where no step has μ > 0. `check` raises what must end a wait early."""
        self._config = config
        self._ledger = ledger
        self._experts = experts
        self._row_ids = experts.row_ids() if experts else []
        self._reader = reader
        self._describe_peers = describe_peers
        self._check = check
        self.waiting_for = ""
        """What the train loop waits for now, in words; empty while it does not wait."""
        self._has_cut = False
        self._is_paced = config.algorithm.staleness_policy is StalenessPolicy.PACE
        self.waited_s = 0.0
        """Time from asking for the rows of the last step to having them."""
        self._expert_cursor: int | None = None
        self._ahead = ReadAhead(ledger.changed, self._draft, reader.read)

    def next_rows(self, step: int) -> StepRows:
        """The rows of `step`: those of its committed composition where there is one (a replay), else newly cut."""
        started = time.monotonic()
        composition = self._ledger.history.batch(step) or self._cut(step)
        self._expert_cursor = composition.expert_cursor
        rows = self._ahead.end()
        if rows is None or rows.composition != composition:
            rows = self._reader.read(composition)
        self.waited_s = time.monotonic() - started
        if step + 1 < self._config.learner.num_steps:
            self._ahead.begin(step + 1)
        return rows

    @property
    def num_expert_rows(self) -> int:
        """Rows in the store; 0 where no step has μ > 0."""
        return len(self._row_ids)

    @property
    def expert_epochs(self) -> float | None:
        """Times that the store was drawn from end to end; None before a step is composed, and without a store."""
        return self._expert_cursor / len(self._row_ids) if self._expert_cursor is not None and self._row_ids else None

    def close(self) -> None:
        """Read no further, so that ledger and store can be closed."""
        self._ahead.close()

    def record_uses(self, composition: Composition) -> None:
        """Note in the expert store which rows the step used."""
        if self._experts and composition.expert_row_ids:
            self._experts.record_uses(self._ledger.run_id, composition.step, composition.expert_row_ids)

    def _cut(self, step: int) -> Composition:
        """Fix what `step` is made of, before it is taken."""
        composition = self._compose(step, self._wait_for_groups(step) if self._trains_on_groups(step) else [])
        self._ledger.commit_batch(composition)
        self._has_cut = True
        return composition

    def _draft(self, step: int) -> Composition | None:
        """What `step` would be made of if it were cut now; None where groups are missing.

        With `pace` that is what it will be made of: no group can come before those that are there without a gap. With
        `drop` a lease that was passed by may still come first.
        """
        if committed := self._ledger.history.batch(step):
            return committed
        group_ids: list[int] = []
        if self._trains_on_groups(step):
            wanted = self._config.learner.groups_per_step
            if self._ledger.tallies.count("committed") < wanted:
                return None
            group_ids = self._ledger.candidates(step, waits_for_oldest=self._is_paced)
            if len(group_ids) < wanted:
                return None
        return self._compose(step, group_ids)

    def _trains_on_groups(self, step: int) -> bool:
        return step >= self._config.first_group_step

    def _compose(self, step: int, group_ids: Sequence[int]) -> Composition:
        """These groups, and the expert rows that are next."""
        mean_reward = self._ledger.history.mean_reward(group_ids)
        cursor = self._ledger.history.expert_cursor(step)
        row_ids: list[int] = []
        if self._experts and mu_of(self._config, step, mean_reward=mean_reward) > 0:
            count = self._config.expert.rows_per_step
            positions = draw(len(self._row_ids), seed=self._config.run.seed, cursor=cursor, count=count)
            row_ids = [self._row_ids[position] for position in positions]
            cursor += count
        return Composition(step, tuple(group_ids), tuple(row_ids), cursor)

    def _wait_for_groups(self, step: int) -> list[int]:
        """A whole step's worth of groups: a starved queue never makes a step expert-only."""
        learner = self._config.learner
        limit = learner.group_timeout_s if self._has_cut else learner.start_timeout_s  # engines may still start
        wanted = self._config.learner.groups_per_step
        wait, before = Wait("actors", limit_s=limit), (-1, -1)
        try:
            while True:
                with self._ledger.changed:
                    ready = self._ledger.ready(step, waits_for_oldest=self._is_paced)
                    if len(ready) == wanted:
                        return ready
                    if (came := self._num_arrived()) != before:
                        before = came
                        wait.progress()
                    self.waiting_for = f"{wanted - len(ready)} of {wanted} groups of step {step + 1}"
                    self._ledger.changed.wait(timeout=0.2)
                self._check()
                wait.check(self._describe_wait)
        finally:
            self.waiting_for = ""

    def _num_arrived(self) -> tuple[int, int]:
        """Groups held, and those that came without a signal."""
        tallies = self._ledger.tallies
        return tallies.count("committed"), tallies.dropped().get(DropReason.ZERO_VARIANCE, 0)

    def _describe_wait(self) -> str:
        dropped = ", ".join(f"{count} {why}" for why, count in self._ledger.tallies.dropped().items())
        return f"{self.waiting_for} ({self._describe_peers()}{f'; dropped so far: {dropped}' if dropped else ''})"
