"""The history: what each optimizer step was made of, and the groups themselves as they came."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import OperatorError
from learner.ledger.bodies import Place
from learner.ledger.database import Database


@dataclass(frozen=True)
class Composition:
    """What one optimizer step is made of."""

    step: int
    """Optimizer steps completed when it was cut."""
    group_ids: tuple[int, ...]
    expert_row_ids: tuple[int, ...]
    expert_cursor: int
    """Expert rows drawn since the start of the run, this step's included."""


class History:
    """Reads only."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def batch(self, step: int) -> Composition | None:
        """The committed composition of `step`, where there is one."""
        with self._db.lock:
            row = self._db.execute(
                "SELECT group_ids, expert_row_ids, expert_cursor FROM batches WHERE step = ?", (step,)
            ).fetchone()
        return Composition(step, tuple(json.loads(row[0])), tuple(json.loads(row[1])), row[2]) if row else None

    def mean_reward(self, group_ids: Sequence[int]) -> float | None:
        """Mean reward of the groups' trajectories, as they came; None without groups."""
        query = "SELECT reward_sum, num_trajectories FROM groups WHERE group_id = ?"
        with self._db.lock:
            sums = [self._db.execute(query, (group_id,)).fetchone() for group_id in group_ids]
        return sum(reward for reward, _ in sums) / sum(count for _, count in sums) if sums else None

    def expert_cursor(self, step: int) -> int:
        """Expert rows drawn before `step`."""
        return self._db.count("SELECT coalesce(max(expert_cursor), 0) FROM batches WHERE step < ?", (step,))

    def is_taken(self, step: int) -> bool:
        """Whether the optimizer step was taken at least once."""
        return self._db.count("SELECT count(*) FROM batches WHERE step = ? AND record IS NOT NULL", (step,)) == 1

    def num_batches(self) -> int:
        """Steps whose composition is committed."""
        return self._db.count("SELECT count(*) FROM batches")

    def version_hashes(self) -> dict[int, str]:
        """The hash of every version that was published, by step."""
        with self._db.lock:
            return dict(self._db.execute("SELECT step, hash FROM versions").fetchall())

    def replaced_hashes(self, step: int) -> set[str]:
        """Those that version `step` had before it came out otherwise, or another policy took its place."""
        if not self._db.has_table("replaced_versions"):
            return set()
        with self._db.lock:
            rows = self._db.execute("SELECT hash FROM replaced_versions WHERE step = ?", (step,))
            return {hash for (hash,) in rows}

    def first_whole_step(self) -> int:
        """The step from which on all groups trained are kept."""
        return self._db.count(
            "SELECT coalesce(max(step) + 1, 0) FROM groups WHERE state = 'trained' "
            "AND group_id NOT IN (SELECT group_id FROM bodies)"
        )

    def bodies(self, group_ids: Sequence[int]) -> list[bytes]:
        """The journaled groups, in the order asked. Raises OperatorError where one is not what was written."""
        return [self._body(group_id) for group_id in group_ids]

    def _body(self, group_id: int) -> bytes:
        query = "SELECT file, start, size, hash FROM bodies WHERE group_id = ?"
        with self._db.lock:
            row = self._db.execute(query, (group_id,)).fetchone()
        place = Place(*row) if row else None
        body = self._db.bodies.read(place) if place else None
        if body is None:
            path = self._db.bodies.path(place.file) if place else self._db.path
            what = "damaged" if place and path.exists() else "missing"
            raise OperatorError(
                f"{path}: group {group_id} is {what}, expected the tokens that came: restore run.dir, or go back "
                "before it with chord-learner --rewind"
            )
        return body

    def actor_ids(self, group_ids: Sequence[int]) -> list[str]:
        """Who sampled each group."""
        query = "SELECT actor_id FROM groups WHERE group_id = ?"
        with self._db.lock:
            return [self._db.execute(query, (group_id,)).fetchone()[0] for group_id in group_ids]
