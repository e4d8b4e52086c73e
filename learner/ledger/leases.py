"""The leases of the ledger: who was granted which prompt, and what became of it until a result came."""

import logging
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from learner.ledger.database import Database
from learner.ledger.tallies import Tallies

log = logging.getLogger(__name__)

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


class Standing(NamedTuple):
    """Of a lease that was issued."""

    group_id: int
    actor_id: str
    state: str
    """Of its group."""


class Leases:
    """The part of a ledger that grants and takes back."""

    def __init__(
        self, database: Database, *, groups_per_step: int, max_staleness: int, num_steps: int | None, first_step: int
    ) -> None:
        self._db = database
        self._groups_per_step = groups_per_step
        self._max_staleness = max_staleness
        self._most_groups = 1 << 62 if num_steps is None else (num_steps - first_step) * groups_per_step
        self._first_step = first_step
        self.changed = threading.Condition(database.lock)
        """Notified whenever a group is committed or dropped, or an evaluation ends."""
        self.tallies = Tallies(database)

    def lease(
        self, actor_id: str, session: str, *, capacity: int, serving_step: int, held: Sequence[str]
    ) -> list[GrantedLease]:
        """Up to `capacity` leases for an actor that serves `serving_step`.

        First those that it was granted but does not hold (a reply was lost), then groups whose lease expired, oldest
        first, then new prompts as far as admission allows.
        """
        if capacity <= 0:
            return []
        with self._db.transaction():
            known = set(held)
            active = self._db.execute(
                "SELECT lease_id, group_id, prompt_index FROM leases JOIN groups USING (group_id) WHERE session = ? "
                "AND leases.state = 'active' AND groups.state = 'leased' ORDER BY group_id", (session,),
            )  # fmt: skip
            granted = [GrantedLease(*row) for row in active if row[0] not in known][:capacity]
            limit = self._limit(serving_step)
            orphans = self.tallies.orphans(limit, capacity - len(granted))
            self._db.executemany(
                "UPDATE groups SET actor_id = ?, num_leases = num_leases + 1 WHERE group_id = ?",
                [(actor_id, group_id) for group_id, _ in orphans],
            )
            fresh = self._next_groups(limit, capacity - len(granted) - len(orphans))
            self._db.executemany(
                "INSERT INTO groups (group_id, prompt_index, actor_id, state, num_leases) "
                "VALUES (?, ?, ?, 'leased', 1)",
                [(group_id, prompt_index, actor_id) for group_id, prompt_index in fresh],
            )
            new = [
                GrantedLease(f"{group_id}.{uuid.uuid4().hex[:12]}", group_id, prompt_index)
                for group_id, prompt_index in (*orphans, *fresh)
            ]
            self._db.executemany(
                "INSERT INTO leases VALUES (?, ?, ?, ?, 'active')",
                [(lease.lease_id, lease.group_id, actor_id, session) for lease in new],
            )
            return granted + new

    def share(self, num_actors: int) -> int:
        """Leases that one of so many actors may hold: all places at most, so that nobody keeps a newcomer out."""
        return -(-(self._max_staleness + 1) * self._groups_per_step // max(num_actors, 1))

    def _limit(self, serving_step: int) -> int:
        """The last place that may be leased to an actor that serves this version."""
        if serving_step < self._first_step:
            return 0
        num_steps = serving_step - self._first_step + self._max_staleness + 1
        return min(num_steps * self._groups_per_step, self._most_groups)

    def _next_groups(self, limit: int, count: int) -> list[tuple[int, int]]:
        """Up to `count` new groups whose place is within `limit`, each with its prompt."""
        if count <= 0:
            return []
        last = self._db.count("SELECT coalesce(max(group_id), 0) FROM groups")
        num_new = max(0, min(count, limit - (last - self.tallies.count("dropped"))))
        return list(enumerate(self._next_prompts(num_new), start=last + 1))

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

    def standing(self, lease_id: str) -> Standing | None:
        """Of a lease that was issued; None of any other."""
        with self._db.lock:
            row = self._db.execute(
                "SELECT group_id, leases.actor_id, groups.state FROM leases JOIN groups USING (group_id) "
                "WHERE lease_id = ?", (lease_id,),
            ).fetchone()  # fmt: skip
        return Standing(*row) if row else None
