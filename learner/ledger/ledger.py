"""The ledger on SQLite: lease → committed → training → trained, or dropped. Every method is one transaction.

Admission is arithmetic. With G groups per step, bound S and v the version that the asking actor serves, group number n
(dropped ones not counted) is leased only if n <= (v + S + 1)·G. Trained in lease order it is used at step
ceil(n/G) − 1 <= v + S: at most S steps late.
"""

import json
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from common.errors import OperatorError
from common.wire.messages import Outcome
from learner.ledger.schema import SCHEMA_VERSION, TABLES

MAX_LEASES_PER_GROUP = 8
"""A prompt that was leased this often without a result is taken for poison and dropped."""

DISK_ERRORS = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_BUSY")


class DropReason(StrEnum):
    """Why a leased prompt was not trained."""

    STALE = "stale"
    POISON = "poison"


@dataclass(frozen=True)
class GrantedLease:
    """A lease and the prompt that it is for."""

    lease_id: str
    group_id: int
    prompt_index: int


@dataclass(frozen=True)
class Composition:
    """What one optimizer step is made of."""

    step: int
    """Optimizer steps completed when it was cut."""
    group_ids: tuple[int, ...]
    expert_row_ids: tuple[int, ...]
    expert_cursor: int
    """Expert rows drawn since the start of the run, this step's included."""


@dataclass(frozen=True)
class GroupCounts:
    """Groups by state; their sum is the number of prompts ever leased."""

    leased: int = 0
    committed: int = 0
    training: int = 0
    trained: int = 0
    dropped: int = 0


class Ledger:
    """One writer's view of the ledger; safe to share between the learner's threads."""

    def __init__(self, path: Path, *, groups_per_step: int, max_staleness: int) -> None:
        """Open or create. Raises OperatorError where the file is no ledger of this version or the disk refuses."""
        self._groups_per_step = groups_per_step
        self._max_staleness = max_staleness
        self._lock = threading.RLock()
        self.changed = threading.Condition(self._lock)
        """Notified whenever a group is committed or dropped, or an evaluation ends."""
        self._path = path
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
            self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;" + TABLES)
            self._open_run()
        except sqlite3.Error as error:
            raise OperatorError(
                f"{path}: {error}, expected a ledger of an earlier start or a folder to create one in"
            ) from error

    def _open_run(self) -> None:
        with self._transaction():
            found = self._fact("schema", SCHEMA_VERSION)
            if found != SCHEMA_VERSION:
                raise OperatorError(f"{self._path}: got ledger schema {found}, expected {SCHEMA_VERSION}")
            self.run_id = self._fact("run_id", uuid.uuid4().hex[:12])
            self.incarnation = int(self._fact("incarnation", "0")) + 1
            self._db.execute("UPDATE facts SET value = ? WHERE name = 'incarnation'", (str(self.incarnation),))
            self._db.execute("UPDATE leases SET state = 'expired' WHERE state = 'active'")

    # Leases

    def lease(
        self, actor_id: str, session: str, *, capacity: int, serving_step: int, held: Sequence[str]
    ) -> list[GrantedLease]:
        """Up to `capacity` leases for an actor that serves `serving_step`.

        First those that it was granted but does not hold (a reply was lost), then groups whose lease expired, oldest
        first, then new prompts as far as admission allows.
        """
        with self._transaction():
            known = set(held)
            active = self._db.execute(
                "SELECT lease_id, group_id, prompt_index FROM leases JOIN groups USING (group_id) WHERE session = ? "
                "AND leases.state = 'active' AND groups.state = 'leased' ORDER BY group_id", (session,),
            )  # fmt: skip
            granted = [GrantedLease(*row) for row in active if row[0] not in known][:capacity]
            limit = (serving_step + self._max_staleness + 1) * self._groups_per_step
            for group_id, prompt_index in self._leasable(limit, capacity - len(granted)):
                granted.append(self._grant(group_id, prompt_index, actor_id, session))
            return granted

    def _leasable(self, limit: int, count: int) -> list[tuple[int, int]]:
        """Groups without an active lease whose place is within `limit`, then new ones; (group_id, prompt_index)."""
        num_dropped = self._count("SELECT count(*) FROM groups WHERE state = 'dropped'")
        last = self._count("SELECT coalesce(max(group_id), 0) FROM groups")
        orphans = self._db.execute(
            "SELECT group_id, prompt_index FROM groups AS g WHERE state = 'leased' AND NOT EXISTS "
            "(SELECT 1 FROM leases WHERE leases.group_id = g.group_id AND leases.state = 'active') "
            "AND group_id - (SELECT count(*) FROM groups AS d WHERE d.state = 'dropped' AND d.group_id < g.group_id) "
            "<= ? ORDER BY group_id LIMIT ?", (limit, count),
        ).fetchall()  # fmt: skip
        num_new = max(0, min(count - len(orphans), limit - (last - num_dropped)))
        fresh = [(group_id, group_id - 1) for group_id in range(last + 1, last + 1 + num_new)]
        self._db.executemany("INSERT INTO groups (group_id, prompt_index, state) VALUES (?, ?, 'leased')", fresh)
        return [*orphans, *fresh]

    def _grant(self, group_id: int, prompt_index: int, actor_id: str, session: str) -> GrantedLease:
        lease_id = f"{group_id}.{uuid.uuid4().hex[:12]}"
        self._db.execute("INSERT INTO leases VALUES (?, ?, ?, ?, 'active')", (lease_id, group_id, actor_id, session))
        self._db.execute(
            "UPDATE groups SET actor_id = ?, num_leases = num_leases + 1 WHERE group_id = ?", (actor_id, group_id)
        )
        return GrantedLease(lease_id, group_id, prompt_index)

    def expire(self, session: str) -> int:
        """Give back the active leases of `session`; returns how many."""
        with self._transaction():
            rows = self._db.execute("SELECT lease_id FROM leases WHERE session = ? AND state = 'active'", (session,))
            gone = [lease_id for (lease_id,) in rows.fetchall()]
            return sum(self._give_back(lease_id, "expired") for lease_id in gone)

    def expire_lease(self, lease_id: str) -> int:
        """Give back one lease, whose actor failed on it; it cannot be reclaimed."""
        with self._transaction():
            return self._give_back(lease_id, "failed")

    def _give_back(self, lease_id: str, state: str) -> int:
        """End an active lease; its group is dropped where this was one too many. Returns how many ended."""
        ended = self._db.execute(
            "UPDATE leases SET state = ? WHERE lease_id = ? AND state = 'active'", (state, lease_id)
        )
        if ended.rowcount:
            poisoned = self._db.execute(
                "UPDATE groups SET state = 'dropped', reason = ? WHERE state = 'leased' AND num_leases >= ? "
                "AND group_id = (SELECT group_id FROM leases WHERE lease_id = ?)",
                (DropReason.POISON, MAX_LEASES_PER_GROUP, lease_id),
            )
            if poisoned.rowcount:
                self.changed.notify_all()
        return ended.rowcount

    def reclaim(self, lease_ids: Sequence[str], session: str) -> None:
        """Leases of `session` that were taken for expired, but that it still works on, are active again."""
        with self._transaction():
            self._db.executemany(
                "UPDATE leases SET state = 'active' WHERE lease_id = ? AND session = ? AND state = 'expired' "
                "AND EXISTS (SELECT 1 FROM groups AS g WHERE g.group_id = leases.group_id AND g.state = 'leased') "
                "AND NOT EXISTS "
                "(SELECT 1 FROM leases AS other WHERE other.group_id = leases.group_id AND other.state = 'active')",
                [(lease_id, session) for lease_id in lease_ids],
            )

    def was_issued_to(self, lease_id: str, actor_id: str) -> bool:
        """Whether `actor_id` was ever granted this lease."""
        with self._lock:
            query = "SELECT count(*) FROM leases WHERE lease_id = ? AND actor_id = ?"
            return self._count(query, (lease_id, actor_id)) == 1

    # Results

    def commit(self, lease_id: str, body: bytes, *, min_version: int, num_trajectories: int) -> tuple[Outcome, str]:
        """Journal a group's result. The first one for a prompt wins; any later one is `redelivered`."""
        with self._transaction():
            row = self._db.execute(
                "SELECT group_id, leases.actor_id, groups.state FROM leases JOIN groups USING (group_id) "
                "WHERE lease_id = ?", (lease_id,),
            ).fetchone()  # fmt: skip
            if row is None:
                return Outcome.REFUSED, f"lease {lease_id} was never issued"
            group_id, actor_id, state = row
            if state != "leased":
                self._db.execute(
                    "UPDATE leases SET state = 'fulfilled' WHERE lease_id = ? AND state = 'active'", (lease_id,)
                )
                self._db.execute("INSERT INTO redeliveries VALUES (1)")
                return Outcome.REDELIVERED, f"group {group_id} is {state}"
            self._db.execute("INSERT INTO bodies VALUES (?, ?)", (group_id, body))
            self._db.execute(
                "UPDATE groups SET state = 'committed', winner = ?, actor_id = ?, min_version = ?, "
                "num_trajectories = ? WHERE group_id = ?",
                (lease_id, actor_id, min_version, num_trajectories, group_id),
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
        with self._transaction():
            swept = self._db.execute(
                "UPDATE groups SET state = 'dropped', reason = ? WHERE state = 'committed' AND ? - min_version > ?",
                (DropReason.STALE, step, self._max_staleness),
            )
            if swept.rowcount:
                self._db.execute(
                    "DELETE FROM bodies WHERE group_id IN (SELECT group_id FROM groups WHERE state = 'dropped')"
                )
            oldest = self._count("SELECT coalesce(min(group_id), 1 << 62) FROM groups WHERE state = 'leased'")
            rows = self._db.execute(
                "SELECT group_id FROM groups WHERE state = 'committed' AND group_id < ? ORDER BY group_id LIMIT ?",
                (oldest if waits_for_oldest else 1 << 62, self._groups_per_step),
            )
            return [group_id for (group_id,) in rows]

    def commit_batch(self, composition: Composition) -> None:
        """Fix what a step trains on, before it is taken."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO batches VALUES (?, ?, ?, ?)",
                (
                    composition.step, json.dumps(composition.group_ids), json.dumps(composition.expert_row_ids),
                    composition.expert_cursor,
                ),
            )  # fmt: skip
            self._db.executemany(
                "UPDATE groups SET state = 'training', step = ? WHERE group_id = ?",
                [(composition.step, group_id) for group_id in composition.group_ids],
            )

    def batch(self, step: int) -> Composition | None:
        """The committed composition of `step`, where there is one."""
        with self._lock:
            row = self._db.execute(
                "SELECT group_ids, expert_row_ids, expert_cursor FROM batches WHERE step = ?", (step,)
            ).fetchone()
        return Composition(step, tuple(json.loads(row[0])), tuple(json.loads(row[1])), row[2]) if row else None

    def expert_cursor(self, step: int) -> int:
        """Expert rows drawn before `step`."""
        with self._lock:
            return self._count("SELECT coalesce(max(expert_cursor), 0) FROM batches WHERE step < ?", (step,))

    def bodies(self, group_ids: Sequence[int]) -> list[bytes]:
        """The journaled groups, in the order asked."""
        with self._lock:
            return [
                self._db.execute("SELECT body FROM bodies WHERE group_id = ?", (group_id,)).fetchone()[0]
                for group_id in group_ids
            ]

    def actor_ids(self, group_ids: Sequence[int]) -> list[str]:
        """Who sampled each group."""
        with self._lock:
            query = "SELECT actor_id FROM groups WHERE group_id = ?"
            return [self._db.execute(query, (group_id,)).fetchone()[0] for group_id in group_ids]

    def finish_batch(self, step: int) -> None:
        """The step was taken."""
        with self._transaction():
            self._db.execute("UPDATE groups SET state = 'trained' WHERE state = 'training' AND step = ?", (step,))

    def prune_bodies(self, before_step: int) -> None:
        """Forget the tokens of groups trained before `before_step`, which every kept checkpoint covers."""
        with self._transaction():
            self._db.execute(
                "DELETE FROM bodies WHERE group_id IN "
                "(SELECT group_id FROM groups WHERE state = 'trained' AND step < ?)", (before_step,),
            )  # fmt: skip

    # Evaluations

    def owe_evaluation(self, step: int) -> bool:
        """Note that version `step` is to be evaluated; False where it has been."""
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO evaluations (step) VALUES (?)", (step,))
            return self._count("SELECT count(*) FROM evaluations WHERE step = ? AND result IS NULL", (step,)) == 1

    def owed_evaluations(self) -> list[int]:
        with self._lock:
            return [
                step for (step,) in self._db.execute("SELECT step FROM evaluations WHERE result IS NULL ORDER BY step")
            ]

    def finish_evaluation(self, step: int, result: dict[str, object]) -> Outcome:
        with self._transaction():
            done = self._db.execute(
                "UPDATE evaluations SET result = ? WHERE step = ? AND result IS NULL", (json.dumps(result), step)
            )
            self.changed.notify_all()
            return Outcome.COMMITTED if done.rowcount else Outcome.REDELIVERED

    def evaluation_results(self) -> list[dict[str, object]]:
        """Every finished evaluation, oldest version first."""
        with self._lock:
            rows = self._db.execute("SELECT result FROM evaluations WHERE result IS NOT NULL ORDER BY step")
            return [json.loads(result) for (result,) in rows]

    # Counts

    def counts(self) -> GroupCounts:
        with self._lock:
            return GroupCounts(**dict(self._db.execute("SELECT state, count(*) FROM groups GROUP BY state").fetchall()))

    def num_redelivered(self) -> int:
        with self._lock:
            return self._count("SELECT count(*) FROM redeliveries")

    def num_lost(self) -> int:
        """Acknowledged groups that are neither trained, dropped nor held."""
        with self._lock:
            return self._count(
                "SELECT count(*) FROM groups WHERE state IN ('committed', 'training') "
                "AND group_id NOT IN (SELECT group_id FROM bodies)"
            )

    def num_duplicates(self) -> int:
        """Groups that appear more than once in the committed batches."""
        with self._lock:
            rows = self._db.execute("SELECT count(*) - count(DISTINCT value) FROM batches, json_each(group_ids)")
            return int(rows.fetchone()[0])

    def max_trained_staleness(self) -> int:
        with self._lock:
            return self._count("SELECT coalesce(max(staleness), 0) FROM audit_groups WHERE state = 'trained'")

    def num_trained_trajectories(self) -> int:
        with self._lock:
            return self._count("SELECT coalesce(sum(num_trajectories), 0) FROM groups WHERE state = 'trained'")

    def fact(self, name: str, value: str) -> str:
        """The stored value of `name`; `value` is stored where there is none yet."""
        with self._transaction():
            return self._fact(name, value)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _fact(self, name: str, value: str) -> str:
        self._db.execute("INSERT OR IGNORE INTO facts VALUES (?, ?)", (name, value))
        return self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()[0]

    def _count(self, query: str, parameters: tuple[object, ...] = ()) -> int:
        return int(self._db.execute(query, parameters).fetchone()[0])

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Several calls under one commit, so that many results share one write to disk."""
        with self._transaction():
            yield

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            if self._db.in_transaction:
                yield
                return
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            except BaseException as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorname.startswith(DISK_ERRORS):
                    raise OperatorError(
                        f"{self._path}: {error}, expected free disk space and a writable file"
                    ) from error
                raise
