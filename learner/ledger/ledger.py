"""The ledger on SQLite: lease → committed → training → trained, or dropped. Every method is one transaction.

Admission is arithmetic. With G groups per step, bound S and v the version that the asking actor serves, group number n
(dropped ones not counted) is leased only if n <= (v + S + 1)·G. Trained in lease order it is used at step
ceil(n/G) − 1 <= v + S: at most S steps late. Where the first F steps train on no groups, all steps count from F, and
nothing is leased before version F.
"""

import json
import logging
import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from common.errors import OperatorError
from common.wire.messages import Outcome
from learner.ledger.account import Account
from learner.ledger.database import Database
from learner.ledger.evaluations import Evaluations
from learner.ledger.history import Composition, History
from learner.ledger.schema import SCHEMA_VERSION
from learner.ledger.tallies import Tallies

log = logging.getLogger(__name__)

REWINDING = "rewinding_to"
MAX_LEASES_PER_GROUP = 8
"""A prompt that was leased this often without a result is taken for poison and dropped."""


class DropReason(StrEnum):
    """Why a leased prompt was not trained."""

    STALE = "stale"
    ZERO_VARIANCE = "zero_variance"
    POISON = "poison"
    ROLLED_BACK = "rolled_back"


@dataclass(frozen=True)
class GrantedLease:
    """A lease and the prompt that it is for."""

    lease_id: str
    group_id: int
    prompt_index: int


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


class _Standing(NamedTuple):
    """Of a lease that was issued."""

    group_id: int
    actor_id: str
    state: str
    """Of its group."""


class Ledger:
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
        self._most_groups = 1 << 62 if num_steps is None else (num_steps - first_step) * groups_per_step
        self._first_step = first_step
        self._groups_per_step = groups_per_step
        self._max_staleness = max_staleness
        self._db = Database(path)
        self.changed = threading.Condition(self._db.lock)
        """Notified whenever a group is committed or dropped, or an evaluation ends."""
        self.account = Account(self._db)
        self.history = History(self._db)
        self.evaluations = Evaluations(self._db, self.changed)
        with self._db.transaction():
            self.fact("schema", SCHEMA_VERSION)
            self.fact("max_staleness", str(max_staleness))
            self.run_id = self.fact("run_id", uuid.uuid4().hex[:12])
            self.incarnation = self._db.increase("incarnation") + 1
            self._db.execute("UPDATE leases SET state = 'expired' WHERE state = 'active'")
        self.tallies = Tallies(self._db)

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

    # Leases

    def lease(
        self, actor_id: str, session: str, *, capacity: int, serving_step: int, held: Sequence[str]
    ) -> list[GrantedLease]:
        """Up to `capacity` leases for an actor that serves `serving_step`.

        First those that it was granted but does not hold (a reply was lost), then groups whose lease expired, oldest
        first, then new prompts as far as admission allows.
        """
        with self._db.transaction():
            known = set(held)
            active = self._db.execute(
                "SELECT lease_id, group_id, prompt_index FROM leases JOIN groups USING (group_id) WHERE session = ? "
                "AND leases.state = 'active' AND groups.state = 'leased' ORDER BY group_id", (session,),
            )  # fmt: skip
            granted = [GrantedLease(*row) for row in active if row[0] not in known][:capacity]
            limit = self._limit(serving_step)
            for group_id, prompt_index in self._leasable(limit, capacity - len(granted)):
                granted.append(self._grant(group_id, prompt_index, actor_id, session))
            return granted

    def _limit(self, serving_step: int) -> int:
        """The last place that may be leased to an actor that serves this version."""
        if serving_step < self._first_step:
            return 0
        num_steps = serving_step - self._first_step + self._max_staleness + 1
        return min(num_steps * self._groups_per_step, self._most_groups)

    def _leasable(self, limit: int, count: int) -> list[tuple[int, int]]:
        """Groups without an active lease whose place is within `limit`, then new ones; (group_id, prompt_index)."""
        if count <= 0:
            return []
        orphans = self.tallies.orphans(limit, count)
        last = self._db.count("SELECT coalesce(max(group_id), 0) FROM groups")
        num_new = max(0, min(count - len(orphans), limit - (last - self.tallies.count("dropped"))))
        fresh = list(enumerate(self._next_prompts(num_new), start=last + 1))
        self._db.executemany("INSERT INTO groups (group_id, prompt_index, state) VALUES (?, ?, 'leased')", fresh)
        return [*orphans, *fresh]

    def _next_prompts(self, count: int) -> list[int]:
        """Prompts that a rewind returned, then the next ones of the training split."""
        if count == 0:
            return []
        rows = self._db.execute("SELECT prompt_index FROM returned_prompts ORDER BY prompt_index LIMIT ?", (count,))
        returned = [prompt_index for (prompt_index,) in rows]
        self._db.executemany(
            "DELETE FROM returned_prompts WHERE prompt_index = ?", [(prompt_index,) for prompt_index in returned]
        )
        num_new = count - len(returned)
        first = self._db.increase("next_prompt", by=num_new) if num_new else 0
        return [*returned, *range(first, first + num_new)]

    def _grant(self, group_id: int, prompt_index: int, actor_id: str, session: str) -> GrantedLease:
        lease_id = f"{group_id}.{uuid.uuid4().hex[:12]}"
        self._db.execute("INSERT INTO leases VALUES (?, ?, ?, ?, 'active')", (lease_id, group_id, actor_id, session))
        self._db.execute(
            "UPDATE groups SET actor_id = ?, num_leases = num_leases + 1 WHERE group_id = ?", (actor_id, group_id)
        )
        return GrantedLease(lease_id, group_id, prompt_index)

    def expire(self, session: str) -> int:
        """Give back the active leases of `session`; returns how many."""
        with self._db.transaction():
            rows = self._db.execute("SELECT lease_id FROM leases WHERE session = ? AND state = 'active'", (session,))
            gone = [lease_id for (lease_id,) in rows.fetchall()]
            return sum(self._give_back(lease_id, "expired") for lease_id in gone)

    def expire_lease(self, lease_id: str) -> int:
        """Give back one lease, whose actor failed on it; it cannot be reclaimed."""
        with self._db.transaction():
            return self._give_back(lease_id, "failed")

    def _give_back(self, lease_id: str, state: str) -> int:
        """End an active lease; its group is dropped where this was one too many. Returns how many ended."""
        ended = self._db.execute(
            "UPDATE leases SET state = ? WHERE lease_id = ? AND state = 'active'", (state, lease_id)
        )
        if ended.rowcount:
            poisoned = self._db.execute(
                "UPDATE groups SET state = 'dropped', reason = ? WHERE state = 'leased' AND num_leases >= ? "
                "AND group_id = (SELECT group_id FROM leases WHERE lease_id = ?) RETURNING group_id, prompt_index",
                (DropReason.POISON, MAX_LEASES_PER_GROUP, lease_id),
            ).fetchall()
            for group_id, prompt_index in poisoned:
                log.error(
                    "prompt %d (group %d) was leased %d times without a result: dropped as poison",
                    prompt_index,
                    group_id,
                    MAX_LEASES_PER_GROUP,
                )
                self.changed.notify_all()
        return ended.rowcount

    def reclaim(self, lease_ids: Sequence[str], session: str) -> None:
        """Leases of `session` that were taken for expired, but that it still works on, are active again."""
        with self._db.transaction():
            query = "SELECT lease_id FROM leases WHERE session = ? AND state = 'active'"
            active = {lease_id for (lease_id,) in self._db.execute(query, (session,))}
            self._db.executemany(
                "UPDATE leases SET state = 'active' WHERE lease_id = ? AND session = ? AND state = 'expired' "
                "AND EXISTS (SELECT 1 FROM groups AS g WHERE g.group_id = leases.group_id AND g.state = 'leased') "
                "AND NOT EXISTS "
                "(SELECT 1 FROM leases AS other WHERE other.group_id = leases.group_id AND other.state = 'active')",
                [(lease_id, session) for lease_id in lease_ids if lease_id not in active],
            )

    def was_issued_to(self, lease_id: str, actor_id: str) -> bool:
        """Whether `actor_id` was ever granted this lease."""
        with self._db.lock:
            standing = self._standing(lease_id)
        return standing is not None and standing.actor_id == actor_id

    def _standing(self, lease_id: str) -> "_Standing | None":
        row = self._db.execute(
            "SELECT group_id, leases.actor_id, groups.state FROM leases JOIN groups USING (group_id) "
            "WHERE lease_id = ?", (lease_id,),
        ).fetchone()  # fmt: skip
        return _Standing(*row) if row else None

    # Results

    def redeliver(self, lease_id: str) -> str | None:
        """Why a result of this lease comes too late, which is noted; None where it does not."""
        with self._db.lock:
            standing = self._standing(lease_id)
        return None if standing is None or standing.state == "leased" else self._note_late(lease_id, standing)

    def _note_late(self, lease_id: str, standing: "_Standing") -> str:
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
            standing = self._standing(lease_id)
            if standing is None:
                return Outcome.REFUSED, f"lease {lease_id} was never issued"
            if standing.state != "leased":
                return Outcome.REDELIVERED, self._note_late(lease_id, standing)
            if drop is None:
                self._db.execute("INSERT INTO bodies VALUES (?, ?)", (standing.group_id, body))
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
        """Note the hash of a published version; returns the one noted before, which a replay ought to give again."""
        with self._db.transaction():
            row = self._db.execute("SELECT hash FROM versions WHERE step = ?", (step,)).fetchone()
            self._db.execute("REPLACE INTO versions VALUES (?, ?)", (step, hash))
            return row[0] if row else hash

    def prune_bodies(self, before_step: int) -> None:
        """Forget the tokens of groups trained before `before_step`, which every kept checkpoint covers."""
        with self._db.transaction():
            self._db.execute(
                "DELETE FROM bodies WHERE group_id IN "
                "(SELECT group_id FROM groups WHERE state = 'trained' AND step < ?)", (before_step,),
            )  # fmt: skip

    def begin_rewind(self, step: int) -> None:
        """Note that a rewind has begun; until `rewind` has ended it, the run must not go on."""
        self._db.set_fact(REWINDING, str(step))

    def check_rewind(self) -> None:
        """Raises OperatorError where a rewind was cut short."""
        if step := self._db.fact(REWINDING):
            raise OperatorError(
                f"{self._db.path}: a rewind was cut short, expected: chord-learner --rewind {step} again"
            )

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
            self._db.execute("DELETE FROM evaluations WHERE step > ?", (step,))
            self._db.set_fact(REWINDING, "")
            return len(dropped)
