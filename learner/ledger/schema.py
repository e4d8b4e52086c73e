"""The ledger's tables, the digest that every row carries, and the view that auditors read."""

import hashlib

SCHEMA_VERSION = "6"

DIGEST_BYTES = 8

DIGESTED = {
    "facts": "name, value",
    "groups": "group_id, prompt_index, state, reason, winner, actor_id, step, min_version, num_trajectories, "
    "num_answer_tokens, reward_sum, sampling_s, num_leases",
    "leases": "lease_id, group_id, actor_id, session, state",
    "returned_prompts": "prompt_index",
    "bodies": "group_id, file, start, size, hash",
    "batches": "step, group_ids, expert_row_ids, expert_cursor, record",
    "versions": "step, hash",
    "replaced_versions": "step, hash",
    "evaluations": "step, result",
}
"""Table → the columns that its digest covers: all of them."""

ADDED = {"replaced_versions"}
"""Tables that came later: a ledger of this schema that no learner has opened since lacks them."""


def row_digest(*values: object) -> bytes:
    """Names a row's content, so that a bit which flipped on disk is noticed."""
    return hashlib.blake2b(repr(values).encode(), digest_size=DIGEST_BYTES).digest()


def _digest(table: str) -> str:
    return f"digest BLOB GENERATED ALWAYS AS (row_digest({DIGESTED[table]})) STORED"


TABLES = f"""
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL, {_digest("facts")}) WITHOUT ROWID;

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
    num_answer_tokens INTEGER,  -- of all its trajectories, as the two below; known once committed
    reward_sum REAL,
    sampling_s REAL,            -- from lease to group, by the actor's clock
    num_leases INTEGER NOT NULL DEFAULT 0,
    {_digest("groups")}
);
CREATE INDEX IF NOT EXISTS groups_by_state ON groups (state, group_id);

-- Every lease ever issued; a group has several where one expired.
CREATE TABLE IF NOT EXISTS leases (
    lease_id TEXT PRIMARY KEY,
    group_id INTEGER NOT NULL REFERENCES groups (group_id),
    actor_id TEXT NOT NULL,
    session TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('active', 'expired', 'failed', 'fulfilled')),
    {_digest("leases")}
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS active_leases ON leases (session) WHERE state = 'active';
CREATE INDEX IF NOT EXISTS leases_by_group ON leases (group_id);

-- Prompts whose groups a rewind dropped: they are leased again before new ones.
CREATE TABLE IF NOT EXISTS returned_prompts (prompt_index INTEGER PRIMARY KEY, {_digest("returned_prompts")});

-- Where the group lies as it came (see bodies.py); kept until every kept checkpoint covers its step.
CREATE TABLE IF NOT EXISTS bodies (
    group_id INTEGER PRIMARY KEY REFERENCES groups (group_id),
    file INTEGER NOT NULL,
    start INTEGER NOT NULL,     -- in bytes, as its size
    size INTEGER NOT NULL,
    hash BLOB NOT NULL,
    {_digest("bodies")}
);
CREATE INDEX IF NOT EXISTS bodies_by_file ON bodies (file);

-- The composition of each optimizer step, committed before the step is taken.
CREATE TABLE IF NOT EXISTS batches (
    step INTEGER PRIMARY KEY,
    group_ids TEXT NOT NULL,    -- JSON list, in training order
    expert_row_ids TEXT NOT NULL,
    expert_cursor INTEGER NOT NULL,
    record TEXT,                -- its line of metrics.jsonl; NULL until the step was taken
    {_digest("batches")}
);

-- The hash of every published version.
CREATE TABLE IF NOT EXISTS versions (step INTEGER PRIMARY KEY, hash TEXT NOT NULL, {_digest("versions")});

-- What `versions` held before: a replay may give other bits, and a handover puts another policy in its place.
CREATE TABLE IF NOT EXISTS replaced_versions (
    step INTEGER NOT NULL,
    hash TEXT NOT NULL,
    {_digest("replaced_versions")},
    PRIMARY KEY (step, hash)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS evaluations (
    step INTEGER PRIMARY KEY,
    result TEXT,                -- JSON list of its lines of eval.jsonl, one a task, none if waived; NULL while owed
    {_digest("evaluations")}
);

CREATE VIEW IF NOT EXISTS audit_groups AS
    SELECT group_id, winner AS lease_id, actor_id, state, reason, step, min_version, step - min_version AS staleness,
        num_trajectories
    FROM groups;
"""
