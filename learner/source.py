"""Where a step's rows come from: groups of the ledger, in lease order, and expert rows, drawn without replacement.

Consumes committed groups and the expert store; waits for actors, within a time limit that names them; is unblocked by
the inbox; produces a composition, committed before its step, and the rows of it.
"""

import time
from collections.abc import Callable

from common.config.schema import Config, StalenessPolicy
from common.wait import Wait
from learner.expert.sampler import draw
from learner.expert.store import ExpertStore
from learner.ledger.history import Composition
from learner.ledger.ledger import Ledger
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
        self._has_composed = False
        self.waited_s = 0.0
        """Time that the last step waited for groups."""

    def next_rows(self, step: int) -> StepRows:
        """The rows of `step`: those of its committed composition where there is one (a replay), else newly cut."""
        started = time.monotonic()
        composition = self._ledger.history.batch(step) or self._compose(step)
        self.waited_s = time.monotonic() - started
        return self._reader.read(composition)

    def record_uses(self, composition: Composition) -> None:
        """Note in the expert store which rows the step used."""
        if self._experts and composition.expert_row_ids:
            self._experts.record_uses(self._ledger.run_id, composition.step, composition.expert_row_ids)

    def _compose(self, step: int) -> Composition:
        trains_on_groups = self._config.algorithm.trains_on_groups and step >= self._config.sft_steps
        group_ids = self._wait_for_groups(step) if trains_on_groups else []
        mean_reward = self._ledger.history.mean_reward(group_ids)
        cursor = self._ledger.history.expert_cursor(step)
        row_ids: list[int] = []
        if self._experts and mu_of(self._config, step, mean_reward=mean_reward) > 0:
            count = self._config.expert.rows_per_step
            positions = draw(len(self._row_ids), seed=self._config.run.seed, cursor=cursor, count=count)
            row_ids = [self._row_ids[position] for position in positions]
            cursor += count
        composition = Composition(step, tuple(group_ids), tuple(row_ids), cursor)
        self._ledger.commit_batch(composition)
        self._has_composed = True
        return composition

    def _wait_for_groups(self, step: int) -> list[int]:
        """A whole step's worth of groups: a starved queue never makes a step expert-only."""
        learner = self._config.learner
        limit = learner.group_timeout_s if self._has_composed else learner.start_timeout_s  # engines may still start
        wanted = self._config.learner.groups_per_step
        is_paced = self._config.algorithm.staleness_policy is StalenessPolicy.PACE
        wait, most = Wait("actors", limit_s=limit), -1
        try:
            while True:
                with self._ledger.changed:
                    ready = self._ledger.ready(step, waits_for_oldest=is_paced)
                    if len(ready) == wanted:
                        return ready
                    if (held := self._ledger.account.counts().committed) != most:
                        most = held
                        wait.progress()
                    self.waiting_for = f"{wanted - len(ready)} of {wanted} groups of step {step + 1}"
                    self._ledger.changed.wait(timeout=0.2)
                self._check()
                wait.check(f"{self.waiting_for} ({self._describe_peers()}{self._describe_dropped()})")
        finally:
            self.waiting_for = ""

    def _describe_dropped(self) -> str:
        dropped = self._ledger.account.dropped()
        return f"; dropped so far: {', '.join(f'{count} {why}' for why, count in dropped.items())}" if dropped else ""
