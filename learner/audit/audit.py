"""What a run left behind, checked against itself: ledger, checkpoints, metrics.jsonl and eval.jsonl.

Every check yields one line for each fault: what, where, got, expected. No line, no fault.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.config.load import resolve_config
from common.errors import OperatorError
from common.run_dir import RunDir
from common.weights.snapshot import read_snapshot
from common.wire.codec import WireError
from common.wire.groups import from_blob
from learner.checkpoints import Checkpoints
from learner.final import EXPORT
from learner.handover import CHOICE, Choice
from learner.ledger.account import Account, Yield
from learner.ledger.database import Database
from learner.ledger.history import History

MAX_VIOLATIONS = 100
"""Violations listed at most."""


@dataclass(frozen=True)
class Report:
    """What was found; `violations` is empty for a run that accounts for everything."""

    run_id: str
    incarnations: int
    steps: int
    groups: dict[str, int]
    """By state."""
    dropped: dict[str, int]
    """By reason."""
    leases: dict[str, int]
    """By state; several for a group where one expired."""
    trajectories_trained: int
    redelivered: int
    lost: int
    duplicates: int
    max_staleness_trained: int
    max_staleness: int
    """The bound."""
    checkpoints: dict[int, str]
    """Step → `good`, or what is wrong with it."""
    sampled: Yield
    trained: Yield
    violations: list[str] = field(default_factory=list[str])

    @property
    def is_clean(self) -> bool:
        return not self.violations


Lines = list[dict[str, Any]] | str
"""Those of a file, or what is wrong with it."""


@dataclass(frozen=True)
class Files:
    """What lies beside the ledger, as it was before that was looked at."""

    metrics: Lines
    evaluations: Lines
    checkpoints: dict[int, str]


def audit(run_dir: RunDir) -> Report:
    """Look at a run, finished, stopped or going on. Raises OperatorError where its ledger is missing or damaged."""
    if not run_dir.ledger.exists():
        raise OperatorError(f"{run_dir.path}: holds no ledger.sqlite, expected the run.dir of a run")
    is_over = run_dir.summary.exists() and not run_dir.is_in_use()
    files = Files(
        _read(run_dir.metrics), _read(run_dir.evaluations), _checkpoints(run_dir)
    )  # slow: before the snapshot
    database = Database(run_dir.ledger, is_read_only=True)
    try:
        with database.snapshot():
            return _report(run_dir, database, files, is_over=is_over)
    finally:
        database.close()


def _report(run_dir: RunDir, database: Database, files: Files, *, is_over: bool) -> Report:
    account, history = Account(database), History(database)
    bound = int(database.fact("max_staleness") or 0)
    groups_per_step = int(database.fact("learner.groups_per_step") or 0)
    lost, twice = list(_lost(database)), list(_twice(database))
    slack = 0 if is_over else 1
    violations = [
        *lost, *twice, *_stale(database, bound), *_leases(database), *_batches(database, history, groups_per_step),
        *_bodies(database, history), *_checkpoint_violations(files.checkpoints, history),
        *_lines(run_dir.metrics, files.metrics, account.records(), slack),
        *_lines(run_dir.evaluations, files.evaluations, account.evaluations(), slack * account.num_evaluated_tasks()),
        *_versions(account, history, Choice.read(database.fact(CHOICE))),
        *_final(run_dir, history, database.fact(EXPORT), is_over=is_over),
    ]  # fmt: skip
    return Report(
        run_id=database.fact("run_id") or "",
        incarnations=int(database.fact("incarnation") or 0),
        steps=len(account.records()),
        groups=asdict(account.counts()),
        dropped=account.dropped(),
        leases=_tally(database, "SELECT state, count(*) FROM leases GROUP BY state"),
        trajectories_trained=account.num_trained_trajectories(),
        redelivered=account.num_redelivered(),
        lost=len(lost),
        duplicates=len(twice),
        max_staleness_trained=account.max_trained_staleness(),
        max_staleness=bound,
        checkpoints=files.checkpoints,
        sampled=account.sampled(),
        trained=account.trained(),
        violations=violations[:MAX_VIOLATIONS],
    )


def _tally(database: Database, query: str) -> dict[str, int]:
    return dict(database.execute(query).fetchall())


def _lost(database: Database) -> Iterator[str]:
    rows = database.execute(
        "SELECT group_id, state FROM groups WHERE state IN ('committed', 'training') "
        "AND group_id NOT IN (SELECT group_id FROM bodies)"
    )
    for group_id, state in rows:
        yield f"lost: group {group_id} was acknowledged and is {state}, but its tokens are gone"


def _twice(database: Database) -> Iterator[str]:
    rows = database.execute(
        "SELECT value, count(*) FROM batches, json_each(group_ids) GROUP BY value HAVING count(*) > 1"
    )
    for group_id, count in rows:
        yield f"duplicate: group {group_id} is in {count} batches, expected one"
    rows = database.execute(
        "SELECT prompt_index, count(*) FROM groups WHERE state != 'dropped' GROUP BY prompt_index HAVING count(*) > 1"
    )
    for prompt_index, count in rows:
        yield f"duplicate: prompt {prompt_index} was leased as {count} groups, expected one that is not dropped"


def _stale(database: Database, bound: int) -> Iterator[str]:
    rows = database.execute(
        "SELECT group_id, staleness FROM audit_groups WHERE state IN ('training', 'trained') "
        "AND (staleness > ? OR staleness < 0 OR staleness IS NULL)", (bound,),
    )  # fmt: skip
    for group_id, staleness in rows:
        yield f"staleness: group {group_id} was trained {staleness} steps late, expected 0 to {bound}"


def _leases(database: Database) -> Iterator[str]:
    """Every group has the leases that it counts, and ended in the way that they say."""
    rows = database.execute(
        "SELECT g.group_id, g.state, g.reason, g.num_leases, count(l.lease_id), "
        "coalesce(sum(l.lease_id = g.winner AND l.state = 'fulfilled'), 0), coalesce(sum(l.state = 'active'), 0) "
        "FROM groups AS g LEFT JOIN leases AS l USING (group_id) GROUP BY g.group_id"
    )
    for group_id, state, reason, num_leases, found, won, active in rows:
        if num_leases != found or found == 0:
            yield f"leases: group {group_id} has {found} leases, expected {num_leases}, and at least one"
        if state in ("committed", "training", "trained") and won != 1:
            yield f"leases: group {group_id} is {state}, but the lease that it names as winner is not fulfilled"
        if (state == "dropped") != (reason is not None):
            yield f"leases: group {group_id} is {state} with reason {reason}, expected a reason where dropped"
        if active > 1:
            yield f"leases: group {group_id} has {active} active leases, expected one at most"


def _batches(database: Database, history: History, groups_per_step: int) -> Iterator[str]:
    """Steps follow one another, each was taken but the last; each group of a batch says the same step; no other group
    says one and is trained."""
    num_batches = history.num_batches()
    cursor = 0
    listed: set[int] = set()
    for step in range(num_batches):
        composition = history.batch(step)
        if composition is None:
            yield f"batches: step {step} is missing, expected every one below {num_batches}"
            continue
        if composition.expert_cursor - len(composition.expert_row_ids) != cursor:
            yield f"batches: step {step} begins its expert rows elsewhere than the step before it ended ({cursor})"
        cursor = composition.expert_cursor
        listed |= set(composition.group_ids)
        if len(composition.group_ids) not in (0, groups_per_step):
            yield f"batches: step {step} has {len(composition.group_ids)} groups, expected {groups_per_step}, or none"
        if step < num_batches - 1 and not history.is_taken(step):
            yield f"batches: step {step} was never taken, though a later one is there"
        for group_id in composition.group_ids:
            row = database.execute("SELECT step, state FROM groups WHERE group_id = ?", (group_id,)).fetchone()
            if row not in ((step, "training"), (step, "trained")):
                yield f"batches: group {group_id} of step {step} is noted as {row}, expected that step, trained"
    rows = database.execute("SELECT group_id FROM groups WHERE state IN ('training', 'trained')")
    for group_id in {group_id for (group_id,) in rows} - listed:
        yield f"batches: group {group_id} is trained, but in no batch"


def _bodies(database: Database, history: History) -> Iterator[str]:
    """The tokens that are kept are those that came, and say of themselves what the ledger says of them."""
    rows = database.execute(
        "SELECT group_id, min_version, num_trajectories, winner FROM groups JOIN bodies USING (group_id)"
    ).fetchall()
    for group_id, *noted in rows:
        try:
            group = from_blob(history.bodies([group_id])[0])
        except (OperatorError, WireError) as error:
            yield f"bodies: {error}"
            continue
        if noted != [group.min_version, len(group.trajectories), group.lease_id]:
            yield f"bodies: group {group_id} is noted with {noted}, but its tokens say otherwise"


def _checkpoints(run_dir: RunDir) -> dict[int, str]:
    """Step → what is wrong with it; one that was pruned while it was looked at does not count."""
    if not run_dir.checkpoints.is_dir():
        return {}
    found = Checkpoints(run_dir.checkpoints, keep=1)
    seen = {one.step: found.damage(one) or "good" for one in found.all()}
    there = {one.step for one in found.all()}
    return {step: state for step, state in seen.items() if step in there}


def _checkpoint_violations(checkpoints: dict[int, str], history: History) -> Iterator[str]:
    for step, state in checkpoints.items():
        if state != "good":
            yield f"checkpoint {step}: {state}"
        if step > history.num_batches():
            yield f"checkpoint {step}: is later than the ledger, which has {history.num_batches()} batches"
    needed = min((step for step, state in checkpoints.items() if state == "good"), default=0)
    if (first := history.first_whole_step()) > needed:
        yield f"recovery: groups are kept from step {first} on, expected from {needed}, the oldest good checkpoint"


def _lines(path: Path, earlier: Lines, expected: list[dict[str, Any]], slack: int) -> Iterator[str]:
    """A file for readers tells what the ledger tells, though both grow while a run goes on: it held no more before the
    ledger was looked at, and holds no less now. `slack`: lines by which either may be ahead of the other."""
    later = _read(path)
    for lines, is_in_time in (
        (earlier, len(earlier) <= len(expected) + slack),
        (later, len(later) >= len(expected) - slack),
    ):
        if isinstance(lines, str):
            yield lines
            return
        common = min(len(lines), len(expected))
        if lines[:common] != expected[:common] or not is_in_time:
            yield f"{path.name}: its {len(lines)} lines are not the {len(expected)} of the ledger"
            return


def _versions(account: Account, history: History, choice: Choice | None) -> Iterator[str]:
    """Every step taken made a version, and what was evaluated is one, or was before a replay gave other bits."""
    hashes = history.version_hashes()
    for step in range(1, len(account.records())):
        if step not in hashes:
            yield f"versions: the one after step {step} is missing"
    for line in account.evaluations():
        was_replaced = choice is not None and choice.step == line["step"]
        expected = choice.hash if choice and was_replaced else hashes.get(line["step"])
        if line["version_hash"] not in {expected, *history.replaced_hashes(line["step"])}:
            yield f"evaluations: that of version {line['step']} on {line['task']} was made with other weights"


def _final(run_dir: RunDir, history: History, exported: str | None, *, is_over: bool) -> Iterator[str]:
    """The exported policy is the last version, byte for byte; where that holds adapters, what was made of it."""
    weights = run_dir.final / "model.safetensors"
    if not (is_over and weights.exists()):
        return
    last = history.num_batches()
    config = resolve_config(run_dir.config).config
    chunk_bytes, is_merged = config.network.chunk_bytes, config.learner.lora_rank > 0
    found = read_snapshot(weights, run_id="", incarnation=0, step=last, chunk_bytes=chunk_bytes).version.hash
    if found != (expected := exported if is_merged else history.version_hashes().get(last)):
        yield f"final: {weights} has hash {found}, expected {expected}, which version {last} was published with"


def _read(path: Path) -> Lines:
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        return f"{path.name}: {error}, expected lines of JSON"
