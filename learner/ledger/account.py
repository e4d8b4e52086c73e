"""The account: what became of every lease, group and step, read from the ledger."""

import json
from dataclasses import dataclass
from typing import Any

from learner.ledger.database import Database


@dataclass(frozen=True)
class GroupCounts:
    """Groups by state; their sum is the number of groups ever leased."""

    leased: int = 0
    committed: int = 0
    training: int = 0
    trained: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Yield:
    """Means over groups that came: all of them, or those trained. Where they differ, training sees a biased sample."""

    num_groups: int
    answer_tokens: float | None
    """Tokens of one answer; None where there is no group."""
    reward: float | None
    sampling_s: float | None
    """Seconds from a lease to its group."""


class Account:
    """Reads only."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def counts(self) -> GroupCounts:
        with self._db.lock:
            rows = self._db.execute("SELECT state, count(*) FROM groups GROUP BY state").fetchall()
        return GroupCounts(**dict(rows))

    def dropped(self) -> dict[str, int]:
        """Dropped groups by reason."""
        with self._db.lock:
            return dict(
                self._db.execute(
                    "SELECT reason, count(*) FROM groups WHERE state = 'dropped' GROUP BY reason"
                ).fetchall()
            )

    def num_lost(self) -> int:
        """Acknowledged groups that are neither trained, dropped nor held."""
        return self._db.count(
            "SELECT count(*) FROM groups WHERE state IN ('committed', 'training') "
            "AND group_id NOT IN (SELECT group_id FROM bodies)"
        )

    def num_duplicates(self) -> int:
        """Groups that appear more than once in the committed batches."""
        return self._db.count("SELECT count(*) - count(DISTINCT value) FROM batches, json_each(group_ids)")

    def num_redelivered(self) -> int:
        return int(self._db.fact("redelivered") or 0)

    def max_trained_staleness(self) -> int:
        return self._db.count("SELECT coalesce(max(staleness), 0) FROM audit_groups WHERE state = 'trained'")

    def num_trained_trajectories(self) -> int:
        return self._db.count("SELECT coalesce(sum(num_trajectories), 0) FROM groups WHERE state = 'trained'")

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, in the order of steps."""
        return self._lines("SELECT record FROM batches WHERE record IS NOT NULL ORDER BY step")

    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of eval.jsonl, oldest version first, tasks in the order of the configuration."""
        results = self._lines("SELECT result FROM evaluations WHERE result IS NOT NULL ORDER BY step")
        return [line for result in results for line in result]

    def num_evaluated_tasks(self) -> int:
        """Lines of one evaluation at most."""
        return self._db.count("SELECT coalesce(max(json_array_length(result)), 0) FROM evaluations")

    def _lines(self, query: str) -> list[Any]:
        with self._db.lock:
            return [json.loads(line) for (line,) in self._db.execute(query)]

    def sampled(self, last: int | None = None) -> Yield:
        """Of every group that came, trained or not; of the `last` ones leased, where given."""
        return self._yield("num_trajectories > 0", last)

    def trained(self, last: int | None = None) -> Yield:
        """The same of those that were or are being trained."""
        return self._yield("state IN ('training', 'trained')", last)

    def answer_lengths(self) -> list[tuple[float, bool]]:
        """Of every group that came and no longer waits: the mean tokens of its answers, and whether it was or is being
        trained."""
        query = (
            "SELECT num_answer_tokens * 1.0 / num_trajectories, state IN ('training', 'trained') FROM groups "
            "WHERE num_trajectories > 0 AND state != 'committed'"
        )
        with self._db.lock:
            return [(length, bool(is_trained)) for length, is_trained in self._db.execute(query)]

    def _yield(self, where: str, last: int | None) -> Yield:
        newest = "(SELECT coalesce(max(group_id), 0) FROM groups)"
        query = (
            "SELECT count(*), sum(num_answer_tokens) * 1.0 / sum(num_trajectories), "
            f"sum(reward_sum) / sum(num_trajectories), avg(sampling_s) FROM groups WHERE {where} "
            f"AND group_id > {newest} - ?"
        )
        with self._db.lock:
            return Yield(*self._db.execute(query, (1 << 62 if last is None else last,)).fetchone())
