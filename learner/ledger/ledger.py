"""The ledger on SQLite: lease → committed → training → trained, or dropped. Every method is one transaction.

Admission is arithmetic. With G groups per step, bound S and v the version that the asking actor serves, group number n
(dropped ones not counted) is leased only if n <= (v + S + 1)·G. Trained in lease order it is used at step
ceil(n/G) − 1 <= v + S: at most S steps late. Where the first F steps train on no groups, all steps count from F, and
nothing is leased before version F.
"""

import json
import logging
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from common.errors import OperatorError
from common.wire.messages import Outcome
from learner.ledger.account import Account
from learner.ledger.database import Database
from learner.ledger.evaluations import Evaluations
from learner.ledger.history import Composition, History
from learner.ledger.leases import DropReason, Leases, Standing
from learner.ledger.schema import SCHEMA_VERSION

log = logging.getLogger(__name__)

REWINDING = "rewinding_to"
REWINDS = "rewinds"


@dataclass(frozen=True)
class Sample:
    """What the ledger notes of a group that came."""

    min_version: int
    """Oldest policy version among its sampled tokens."""
    num_trajectories: int
    num_answer_tokens: int
    """Of all its trajectories together."""
    reward_sum: float
    sampling_s: float


class Ledger(Leases):
    """One writer's view of the ledger; safe to share between the learner's threads."""

    def __init__(
        self,
        path: Path,
        *,
        groups_per_step: int,
        max_staleness: int,
        num_steps: int | None = None,
        first_step: int = 0,
    ) -> None:
        """Open or create. Raises OperatorError where the file is no ledger of this version, or damaged.

        Steps before `first_step` train on no groups; no more are leased than the others, up to `num_steps`, take.
        """
        super().__init__(
            Database(path), groups_per_step=groups_per_step, max_staleness=max_staleness, num_steps=num_steps,
            first_step=first_step,
        )  # fmt: skip
        self.account = Account(self._db)
        self.history = History(self._db)
        self.evaluations = Evaluations(self._db, self.changed)
        with self._db.transaction():
            self.fact("schema", SCHEMA_VERSION)
            self.fact("max_staleness", str(max_staleness))
            self.run_id = self.fact("run_id", uuid.uuid4().hex[:12])
            self.incarnation = self._db.increase("incarnation") + 1
            self._db.execute("UPDATE leases SET state = 'expired' WHERE state = 'active'")

    def fact(self, name: str, value: str) -> str:
        """The stored value of `name`; `value` is stored where there is none yet."""
        with self._db.transaction():
            found = self._db.fact(name)
            if found is None:
                self._db.set_fact(name, value)
            return value if found is None else found

    def set_fact(self, name: str, value: str) -> None:
        self._db.set_fact(name, value)

    def transaction(
        self, *, while_committing: Callable[[Callable[[], bool]], None] | None = None
    ) -> AbstractContextManager[None]:
        """Several calls under one commit, so that many results share one write to disk (see Database.transaction)."""
        return self._db.transaction(while_committing=while_committing)

    def close(self) -> None:
        self._db.close()

    # Results

    def note_late(self, lease_id: str, standing: Standing) -> str:
        """Note that a result came for a group that is leased no more; returns why it comes too late."""
        with self._db.transaction():
            self._db.execute(
                "UPDATE leases SET state = 'fulfilled' WHERE lease_id = ? AND state = 'active'", (lease_id,)
            )
            self._db.increase("redelivered")
        return f"group {standing.group_id} is {standing.state}"

    def commit(
        self, lease_id: str, body: bytes, sample: Sample, *, drop: DropReason | None = None
    ) -> tuple[Outcome, str]:
        """Journal a group's result. The first one for a prompt wins; any later one is `redelivered`.

        With `drop` it is acknowledged, and dropped: another prompt takes its place.
        """
        with self._db.transaction():
            standing = self.standing(lease_id)
            if standing is None:
                return Outcome.REFUSED, f"lease {lease_id} was never issued"
            if standing.state != "leased":
                return Outcome.REDELIVERED, self.note_late(lease_id, standing)
            if drop is None:
                place = self._db.bodies.append(body)
                self._db.execute("INSERT INTO bodies VALUES (?, ?, ?, ?, ?)", (standing.group_id, *place))
            self._db.execute(
                "UPDATE groups SET state = ?, reason = ?, winner = ?, actor_id = ?, min_version = ?, "
                "num_trajectories = ?, num_answer_tokens = ?, reward_sum = ?, sampling_s = ? WHERE group_id = ?",
                (
                    "dropped" if drop else "committed", drop, lease_id, standing.actor_id, sample.min_version,
                    sample.num_trajectories, sample.num_answer_tokens,
                    sample.reward_sum, sample.sampling_s, standing.group_id,
                ),
            )  # fmt: skip
            self._db.execute("UPDATE leases SET state = 'fulfilled' WHERE lease_id = ?", (lease_id,))
            self.changed.notify_all()
            return Outcome.COMMITTED, ""

    # Batches

    def ready(self, step: int, *, waits_for_oldest: bool) -> list[int]:
        """Groups that the batch of `step` can be cut from now, in lease order, at most one step's worth.

        Sweeps out those that have become too stale. Where `waits_for_oldest`, the list ends before the first prompt
        still leased.
        """
        with self._db.transaction():
            swept = self._db.execute(
                "UPDATE groups SET state = 'dropped', reason = ? WHERE state = 'committed' AND ? - min_version > ? "
                "RETURNING group_id", (DropReason.STALE, step, self._max_staleness),
            ).fetchall()  # fmt: skip
            if swept:
                log.warning("%d groups became staler than %d steps: dropped", len(swept), self._max_staleness)
                self._db.executemany("DELETE FROM bodies WHERE group_id = ?", swept)
            return self.candidates(step, waits_for_oldest=waits_for_oldest)

    def candidates(self, step: int, *, waits_for_oldest: bool) -> list[int]:
        """What `ready` would give now; sweeps nothing out."""
        with self._db.lock:
            oldest = self._db.count("SELECT coalesce(min(group_id), 1 << 62) FROM groups WHERE state = 'leased'")
            rows = self._db.execute(
                "SELECT group_id FROM groups WHERE state = 'committed' AND group_id < ? AND ? - min_version <= ? "
                "ORDER BY group_id LIMIT ?",
                (oldest if waits_for_oldest else 1 << 62, step, self._max_staleness, self._groups_per_step),
            )
            return [group_id for (group_id,) in rows]

    def commit_batch(self, composition: Composition) -> None:
        """Fix what a step trains on, before it is taken."""
        with self._db.transaction():
            self._db.execute(
                "INSERT INTO batches VALUES (?, ?, ?, ?, NULL)",
                (
                    composition.step, json.dumps(composition.group_ids), json.dumps(composition.expert_row_ids),
                    composition.expert_cursor,
                ),
            )  # fmt: skip
            self._db.executemany(
                "UPDATE groups SET state = 'training', step = ? WHERE group_id = ?",
                [(composition.step, group_id) for group_id in composition.group_ids],
            )

    def finish_batch(self, step: int, record: str) -> bool:
        """The step was taken; `record` is its line of metrics.jsonl. False for a replay: the first record stays."""
        with self._db.transaction():
            self._db.execute("UPDATE groups SET state = 'trained' WHERE state = 'training' AND step = ?", (step,))
            noted = self._db.execute("UPDATE batches SET record = ? WHERE step = ? AND record IS NULL", (record, step))
            return noted.rowcount == 1

    def note_version(self, step: int, hash: str) -> str:
        """Note the hash of a published version; returns the one noted before, which a replay ought to give again.

        One that differs stays on record as replaced: evaluations were made with it.
        """
        with self._db.transaction():
            row = self._db.execute("SELECT hash FROM versions WHERE step = ?", (step,)).fetchone()
            if row and row[0] != hash:
                self._db.execute("INSERT OR IGNORE INTO replaced_versions VALUES (?, ?)", (step, row[0]))
            self._db.execute("REPLACE INTO versions VALUES (?, ?)", (step, hash))
            return row[0] if row else hash

    def prune_bodies(self, before_step: int) -> None:
        """Forget the tokens of groups trained before `before_step`, which every kept checkpoint covers."""
        with self._db.transaction():
            self._db.execute(
                "DELETE FROM bodies WHERE group_id IN "
                "(SELECT group_id FROM groups WHERE state = 'trained' AND step < ?)", (before_step,),
            )  # fmt: skip
        with self._db.lock:
            self._db.bodies.delete_unnamed({file for (file,) in self._db.execute("SELECT DISTINCT file FROM bodies")})

    def begin_rewind(self, step: int) -> None:
        """Note that a rewind has begun; until `rewind` has ended it, the run must not go on."""
        self._db.set_fact(REWINDING, str(step))

    def check_rewind(self) -> None:
        """Raises OperatorError where a rewind was cut short."""
        if step := self._db.fact(REWINDING):
            raise OperatorError(
                f"{self._db.path}: a rewind was cut short, expected: chord-learner --rewind {step} again"
            )

    @property
    def num_rewinds(self) -> int:
        """How often the run has been taken back."""
        return int(self._db.fact(REWINDS) or 0)

    def rewind(self, step: int) -> int:
        """Go back to the state after `step` optimizer steps: whatever came later is dropped as rolled back, and its
        prompts will be leased again. Returns the number of groups dropped."""
        later = "(state IN ('leased', 'committed', 'training') OR (state = 'trained' AND step >= ?))"
        with self._db.transaction():
            self._db.execute(
                f"INSERT OR IGNORE INTO returned_prompts SELECT prompt_index FROM groups WHERE {later}", (step,)
            )
            dropped = self._db.execute(
                f"UPDATE groups SET state = 'dropped', reason = ? WHERE {later} RETURNING group_id",
                (DropReason.ROLLED_BACK, step),
            ).fetchall()
            self._db.executemany("DELETE FROM bodies WHERE group_id = ?", dropped)
            self._db.execute("DELETE FROM batches WHERE step >= ?", (step,))
            self._db.execute("DELETE FROM versions WHERE step > ?", (step,))
            self._db.execute("DELETE FROM replaced_versions WHERE step > ?", (step,))
            self._db.execute("DELETE FROM evaluations WHERE step > ?", (step,))
            self._db.set_fact(REWINDING, "")
            self._db.increase(REWINDS)
            return len(dropped)
