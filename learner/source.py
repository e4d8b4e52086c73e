"""Where a step's rows come from: groups of the ledger, in lease order, and expert rows, drawn without replacement.

Consumes committed groups and the expert store; waits for actors, within a time limit that names them; is unblocked by
the inbox; produces a composition, committed before its step, and the rows of it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from common.chat import Chat
from common.config.schema import Config, StalenessPolicy
from common.trajectory import TrajectoryGroup
from common.wait import Wait
from common.wire.groups import from_blob
from learner.expert.sampler import draw
from learner.expert.store import ExpertStore
from learner.ledger.ledger import Composition, Ledger
from learner.rows import Row, expert_row, policy_row
from learner.schedule import mu_of


@dataclass(frozen=True, eq=False)
class StepRows:
    """Everything that one optimizer step trains on."""

    composition: Composition
    groups: tuple[TrajectoryGroup, ...]
    rows: list[Row]
    mu: float
    wait_s: float
    """Time that the learner waited for groups."""


class Stopped(Exception):
    """The run was asked to stop while it waited."""


class Source:
    """Composes steps. Rank 0 only."""

    def __init__(
        self, config: Config, ledger: Ledger, experts: ExpertStore | None, chat: Chat, *,
        describe_peers: Callable[[], str], check: Callable[[], None],
    ) -> None:  # fmt: skip
        """`experts` is None where no step has μ > 0. `check` raises what must end a wait early."""
        self._config = config
        self._ledger = ledger
        self._experts = experts
        self._row_ids = experts.row_ids() if experts else []
        self._chat = chat
        self._describe_peers = describe_peers
        self._check = check
        self.waiting_for = ""
        """What the train loop waits for now, in words; empty while it does not wait."""

    def next_rows(self, step: int) -> StepRows:
        """The rows of `step`: those of its committed composition where there is one (a replay), else newly cut."""
        started = time.monotonic()
        composition = self._ledger.batch(step) or self._compose(step)
        waited = time.monotonic() - started
        groups = tuple(from_blob(body) for body in self._ledger.bodies(composition.group_ids))
        return StepRows(
            composition, groups, self._rows(composition, groups), mu_of(self._config.algorithm, step), waited
        )

    def record_uses(self, composition: Composition) -> None:
        """Note in the expert store which rows the step used."""
        if self._experts and composition.expert_row_ids:
            self._experts.record_uses(self._ledger.run_id, composition.step, composition.expert_row_ids)

    def _compose(self, step: int) -> Composition:
        group_ids = self._wait_for_groups(step) if self._config.algorithm.trains_on_groups else []
        cursor = self._ledger.expert_cursor(step)
        row_ids: list[int] = []
        if self._experts and mu_of(self._config.algorithm, step) > 0:
            count = self._config.expert.rows_per_step
            positions = draw(len(self._row_ids), seed=self._config.run.seed, cursor=cursor, count=count)
            row_ids = [self._row_ids[position] for position in positions]
            cursor += count
        composition = Composition(step, tuple(group_ids), tuple(row_ids), cursor)
        self._ledger.commit_batch(composition)
        return composition

    def _wait_for_groups(self, step: int) -> list[int]:
        """A whole step's worth of groups: a starved queue never makes a step expert-only."""
        limit = self._config.learner.start_timeout_s if step == 0 else self._config.learner.group_timeout_s
        wanted = self._config.learner.groups_per_step
        is_paced = self._config.algorithm.staleness_policy is StalenessPolicy.PACE
        wait, most = Wait("actors", limit_s=limit), -1
        try:
            while True:
                with self._ledger.changed:
                    ready = self._ledger.ready(step, waits_for_oldest=is_paced)
                    if len(ready) == wanted:
                        return ready
                    if (held := self._ledger.counts().committed) != most:
                        most = held
                        wait.progress()
                    self.waiting_for = f"{wanted - len(ready)} of {wanted} groups of step {step + 1}"
                    self._ledger.changed.wait(timeout=0.2)
                self._check()
                wait.check(f"{self.waiting_for} ({self._describe_peers()})")
        finally:
            self.waiting_for = ""

    def _rows(self, composition: Composition, groups: tuple[TrajectoryGroup, ...]) -> list[Row]:
        algorithm, temperature = self._config.algorithm, self._config.sampling.temperature
        rows = [policy_row(group, scale=algorithm.advantage_scale, temperature=temperature) for group in groups]
        if self._experts and composition.expert_row_ids:
            demonstrations = self._experts.read(composition.expert_row_ids)
            rows += [expert_row(self._chat.demonstration(row.messages)) for row in demonstrations]
        return rows
