"""The tallies: what leasing and waiting would otherwise count anew each time, however long the run has been.

Temporary tables of the writer's connection, in memory, filled at its start and kept by triggers: what a transaction
takes back, it takes back here too.
"""

from learner.ledger.account import GroupCounts
from learner.ledger.database import Database

TABLES = """
PRAGMA temp_store = MEMORY;

-- Groups by state, and those dropped by reason.
CREATE TEMP TABLE tallies (state TEXT, reason TEXT, num_groups INTEGER NOT NULL, PRIMARY KEY (state, reason))
    WITHOUT ROWID;
INSERT INTO tallies SELECT state, coalesce(reason, ''), count(*) FROM groups GROUP BY 1, 2;

CREATE TEMP TRIGGER group_began AFTER INSERT ON main.groups BEGIN
    INSERT INTO tallies VALUES (NEW.state, coalesce(NEW.reason, ''), 1)
        ON CONFLICT DO UPDATE SET num_groups = num_groups + 1;
END;
CREATE TEMP TRIGGER group_moved AFTER UPDATE OF state ON main.groups WHEN NEW.state <> OLD.state BEGIN
    UPDATE tallies SET num_groups = num_groups - 1 WHERE state = OLD.state AND reason = coalesce(OLD.reason, '');
    INSERT INTO tallies VALUES (NEW.state, coalesce(NEW.reason, ''), 1)
        ON CONFLICT DO UPDATE SET num_groups = num_groups + 1;
END;

-- Leased groups that nobody works on: their lease expired or failed.
CREATE TEMP TABLE orphans (group_id INTEGER PRIMARY KEY);
INSERT INTO orphans SELECT group_id FROM groups WHERE state = 'leased'
    AND group_id NOT IN (SELECT group_id FROM leases WHERE state = 'active');

CREATE TEMP TRIGGER lease_granted AFTER INSERT ON main.leases BEGIN
    DELETE FROM orphans WHERE group_id = NEW.group_id;
END;
CREATE TEMP TRIGGER lease_ended AFTER UPDATE OF state ON main.leases WHEN OLD.state = 'active' AND NEW.state <> 'active'
BEGIN
    INSERT OR IGNORE INTO orphans SELECT group_id FROM groups WHERE group_id = NEW.group_id AND state = 'leased';
END;
CREATE TEMP TRIGGER lease_reclaimed AFTER UPDATE OF state ON main.leases WHEN NEW.state = 'active' BEGIN
    DELETE FROM orphans WHERE group_id = NEW.group_id;
END;
CREATE TEMP TRIGGER group_ended AFTER UPDATE OF state ON main.groups WHEN OLD.state = 'leased' BEGIN
    DELETE FROM orphans WHERE group_id = NEW.group_id;
END;
"""


class Tallies:
    """What `Account` would find, without looking at every group."""

    def __init__(self, database: Database) -> None:
        self._db = database
        database.add_temporary(TABLES)

    def counts(self) -> GroupCounts:
        with self._db.lock:
            rows = self._db.execute("SELECT state, sum(num_groups) FROM tallies GROUP BY state").fetchall()
        return GroupCounts(**dict(rows))

    def count(self, state: str) -> int:
        """Groups in `state`."""
        return self._db.count("SELECT coalesce(sum(num_groups), 0) FROM tallies WHERE state = ?", (state,))

    def dropped(self) -> dict[str, int]:
        """Dropped groups by reason."""
        query = "SELECT reason, num_groups FROM tallies WHERE state = 'dropped' AND num_groups > 0"
        with self._db.lock:
            return dict(self._db.execute(query).fetchall())

    def orphans(self, limit: int, count: int) -> list[tuple[int, int]]:
        """Up to `count` leased groups without an active lease, oldest first, whose place is within `limit`; each with
        its prompt."""
        if count <= 0:
            return []
        query = (
            "SELECT group_id, prompt_index FROM orphans JOIN groups AS g USING (group_id) WHERE group_id - ? + "
            "(SELECT count(*) FROM groups AS d WHERE d.state = 'dropped' AND d.group_id > g.group_id) <= ? "
            "ORDER BY group_id LIMIT ?"
        )
        return self._db.execute(query, (self.count("dropped"), limit, count)).fetchall()
