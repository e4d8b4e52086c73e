"""The ledger's tables and the view that auditors read."""

SCHEMA_VERSION = "1"

TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

-- One leased prompt. Its id is its place in lease order, from 1.
CREATE TABLE IF NOT EXISTS groups (
    group_id INTEGER PRIMARY KEY,
    prompt_index INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('leased', 'committed', 'training', 'trained', 'dropped')),
    reason TEXT,
    winner TEXT,                -- the lease whose result was committed
    actor_id TEXT,              -- who was leased it last, and who won
    step INTEGER,               -- optimizer steps completed when its batch was cut
    min_version INTEGER,        -- oldest policy version among its sampled tokens
    num_trajectories INTEGER NOT NULL DEFAULT 0,
    num_leases INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS groups_by_state ON groups (state, group_id);

-- Every lease ever issued; a group has several where one expired.
CREATE TABLE IF NOT EXISTS leases (
    lease_id TEXT PRIMARY KEY,
    group_id INTEGER NOT NULL REFERENCES groups (group_id),
    actor_id TEXT NOT NULL,
    session TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('active', 'expired', 'failed', 'fulfilled'))
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS active_leases ON leases (session) WHERE state = 'active';
CREATE INDEX IF NOT EXISTS leases_by_group ON leases (group_id);

-- The group as it came; kept until every kept checkpoint covers its step.
CREATE TABLE IF NOT EXISTS bodies (group_id INTEGER PRIMARY KEY REFERENCES groups (group_id), body BLOB NOT NULL);

-- The composition of each optimizer step, committed before the step is taken.
CREATE TABLE IF NOT EXISTS batches (
    step INTEGER PRIMARY KEY,
    group_ids TEXT NOT NULL,    -- JSON list, in training order
    expert_row_ids TEXT NOT NULL,
    expert_cursor INTEGER NOT NULL
);

CREATE TABLE IF NOT EXISTS evaluations (
    step INTEGER PRIMARY KEY,
    result TEXT                 -- one line of eval.jsonl; NULL while it is owed
);

CREATE TABLE IF NOT EXISTS redeliveries (count INTEGER NOT NULL);

CREATE VIEW IF NOT EXISTS audit_groups AS
    SELECT group_id, winner AS lease_id, actor_id, state, reason, step, min_version, step - min_version AS staleness,
        num_trajectories
    FROM groups;
"""
