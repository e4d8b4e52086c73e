"""The ledger: every lease is accounted for, whatever order things happen in, and staleness never exceeds its bound."""

import random
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.errors import OperatorError
from common.wire.messages import Outcome
from learner.ledger import bodies
from learner.ledger.account import GroupCounts
from learner.ledger.database import Database
from learner.ledger.history import Composition, History
from learner.ledger.leases import MAX_LEASES_PER_GROUP, GrantedLease
from learner.ledger.ledger import Ledger, Sample
from tests.runs import files_of_at_most

MEMORY = Path("/dev/shm")
"""Where SQLite's syncs cost nothing, if the machine has it."""


@pytest.fixture
def open_ledger(tmp_path: Path) -> Iterator[Callable[..., Ledger]]:
    """Opens the ledger of the test, again and again."""
    opened: list[Ledger] = []

    def open_(*, groups_per_step: int = 2, max_staleness: int = 1) -> Ledger:
        path = tmp_path / "ledger.sqlite"
        opened.append(Ledger(path, groups_per_step=groups_per_step, max_staleness=max_staleness))
        return opened[-1]

    yield open_
    for ledger in opened:
        ledger.close()


def lease(
    ledger: Ledger, actor: str = "a", *, capacity: int = 1, serving: int = 0, held: tuple[str, ...] = ()
) -> list[GrantedLease]:
    """A request of the actor's only session."""
    return ledger.lease(actor, f"session-{actor}", capacity=capacity, serving_step=serving, held=held)


def commit(ledger: Ledger, granted: GrantedLease, *, min_version: int = 0, body: bytes = b"body") -> Outcome:
    return ledger.commit(granted.lease_id, body, Sample(min_version, 3, 30, 1.5, 0.25))[0]


def commit_together(ledger: Ledger, results: dict[GrantedLease, bytes]) -> None:
    """All of them or none."""
    with ledger.transaction():
        for granted, body in results.items():
            commit(ledger, granted, body=body)


def train(ledger: Ledger, step: int, *, paced: bool = True) -> tuple[int, ...]:
    """Cut, commit and take one optimizer step."""
    group_ids = tuple(ledger.ready(step, waits_for_oldest=paced))
    ledger.commit_batch(Composition(step, group_ids, (), 0))
    ledger.finish_batch(step, "{}")
    return group_ids


def audit(ledger_path: Path, query: str) -> list[tuple[object, ...]]:
    """What another process sees: only what is committed."""
    with closing(sqlite3.connect(ledger_path)) as db:
        return db.execute(query).fetchall()


def test_a_lease_is_committed_then_training_then_trained(open_ledger: Callable[..., Ledger], tmp_path: Path) -> None:
    ledger = open_ledger()
    one, two = lease(ledger, capacity=2)
    assert (one.group_id, one.prompt_index, two.group_id, two.prompt_index) == (1, 0, 2, 1)
    assert ledger.account.counts() == GroupCounts(leased=2)
    assert commit(ledger, two, body=b"two") is commit(ledger, one, body=b"one") is Outcome.COMMITTED
    assert ledger.account.counts() == GroupCounts(committed=2)
    assert ledger.ready(0, waits_for_oldest=True) == [1, 2]
    ledger.commit_batch(Composition(0, (1, 2), (), 0))
    assert ledger.account.counts() == GroupCounts(training=2)
    assert ledger.history.bodies([2, 1]) == [b"two", b"one"]
    assert ledger.history.actor_ids([1, 2]) == ["a", "a"]
    ledger.finish_batch(0, "{}")
    assert ledger.account.counts() == GroupCounts(trained=2)
    assert (ledger.account.num_trained_trajectories(), ledger.account.max_trained_staleness()) == (6, 0)
    assert (ledger.account.num_lost(), ledger.account.num_duplicates(), ledger.account.num_redelivered()) == (0, 0, 0)


@pytest.mark.parametrize(("groups_per_step", "max_staleness"), [(1, 0), (3, 0), (2, 1), (1, 4), (5, 2)])
def test_admission_is_exact(open_ledger: Callable[..., Ledger], groups_per_step: int, max_staleness: int) -> None:
    ledger = open_ledger(groups_per_step=groups_per_step, max_staleness=max_staleness)
    held: list[GrantedLease] = []
    for serving in range(4):
        for _ in range(2):
            held += lease(ledger, capacity=1000, serving=serving, held=tuple(one.lease_id for one in held))
            assert len(held) == (serving + max_staleness + 1) * groups_per_step


def test_without_staleness_the_next_leases_wait_for_the_next_version(open_ledger: Callable[..., Ledger]) -> None:
    ledger = open_ledger(groups_per_step=3, max_staleness=0)
    for step in range(4):
        granted = lease(ledger, capacity=9, serving=step)
        assert len(granted) == 3
        assert lease(ledger, "b", capacity=9, serving=step) == []
        for one in granted:
            commit(ledger, one, min_version=step)
        assert lease(ledger, "b", capacity=9, serving=step) == []
        train(ledger, step)
        assert lease(ledger, "b", capacity=9, serving=step) == []
    assert ledger.account.max_trained_staleness() == 0


def test_an_actor_that_serves_old_weights_is_granted_less(open_ledger: Callable[..., Ledger]) -> None:
    ledger = open_ledger(groups_per_step=2, max_staleness=1)
    for step in range(2):
        for one in lease(ledger, capacity=2, serving=step):
            commit(ledger, one, min_version=step)
        train(ledger, step)
    assert lease(ledger, "old", capacity=9, serving=0) == []
    assert len(lease(ledger, "new", capacity=9, serving=2)) == 4


def test_a_dropped_group_gives_its_place_back(open_ledger: Callable[..., Ledger]) -> None:
    ledger = open_ledger(groups_per_step=1, max_staleness=0)
    (one,) = lease(ledger)
    commit(ledger, one)
    assert ledger.ready(1, waits_for_oldest=True) == []
    assert ledger.account.counts() == GroupCounts(dropped=1)
    (two,) = lease(ledger)
    assert (two.group_id, two.prompt_index) == (2, 1)


def test_expired_leases_go_out_again_before_new_prompts_oldest_first(open_ledger: Callable[..., Ledger]) -> None:
    ledger = open_ledger(groups_per_step=4)
    lease(ledger, "a", capacity=1)
    lease(ledger, "b", capacity=2)
    assert ledger.expire("session-b") == 2
    assert ledger.expire("session-a") == 1
    assert [one.group_id for one in lease(ledger, "c", capacity=2)] == [1, 2]
    assert [one.group_id for one in lease(ledger, "c", capacity=4)] == [1, 2, 3, 4]
    assert ledger.account.counts() == GroupCounts(leased=4)


def test_the_first_result_of_a_prompt_wins_and_the_later_is_redelivered(open_ledger: Callable[..., Ledger]) -> None:
    ledger = open_ledger(groups_per_step=1)
    (early,) = lease(ledger, "a")
    ledger.expire("session-a")
    (late,) = lease(ledger, "b")
    assert early.group_id == late.group_id
    assert early.lease_id != late.lease_id
    assert commit(ledger, early, body=b"first") is Outcome.COMMITTED
    assert commit(ledger, late, body=b"second") is Outcome.REDELIVERED
    assert ledger.history.bodies([1]) == [b"first"]
    assert ledger.history.actor_ids([1]) == ["a"]
    assert train(ledger, 0) == (1,)
    assert commit(ledger, late) is commit(ledger, early) is Outcome.REDELIVERED
    assert (ledger.account.num_redelivered(), ledger.account.num_duplicates(), ledger.account.num_lost()) == (3, 0, 0)


def test_a_lease_that_was_never_issued_is_refused(open_ledger: Callable[..., Ledger]) -> None:
    ledger = open_ledger()
    (one,) = lease(ledger, "a")
    assert ledger.commit("1.beef", b"", Sample(0, 2, 20, 1.0, 0.5))[0] is Outcome.REFUSED
    assert ledger.standing(one.lease_id) == (1, "a", "leased")
    assert ledger.standing("1.beef") is None


@pytest.mark.parametrize("how", ["silence", "failure"])
def test_a_prompt_that_nobody_can_finish_is_dropped_as_poison(open_ledger: Callable[..., Ledger], how: str) -> None:
    ledger = open_ledger(groups_per_step=1)
    for attempt in range(MAX_LEASES_PER_GROUP):
        assert ledger.account.counts().dropped == 0
        (one,) = lease(ledger, f"a{attempt}")
        assert one.group_id == 1
        if how == "silence":
            ledger.expire(f"session-a{attempt}")
        else:
            assert ledger.expire_lease(one.lease_id) == 1
            ledger.reclaim([one.lease_id], f"session-a{attempt}")
    assert ledger.account.counts() == GroupCounts(dropped=1)
    assert commit(ledger, one) is Outcome.REDELIVERED
    assert lease(ledger)[0].group_id == 2


def test_a_failure_told_twice_counts_once(open_ledger: Callable[..., Ledger]) -> None:
    ledger = open_ledger(groups_per_step=1)
    (first,) = lease(ledger, "a0")
    for attempt in range(1, MAX_LEASES_PER_GROUP):
        ledger.expire_lease(first.lease_id)
        ledger.expire(f"session-a{attempt - 1}")
        lease(ledger, f"a{attempt}")
    assert ledger.expire_lease(first.lease_id) == 0
    assert ledger.account.counts() == GroupCounts(leased=1)


def test_leases_whose_reply_was_lost_are_granted_again_and_no_new_ones(open_ledger: Callable[..., Ledger]) -> None:
    ledger = open_ledger(groups_per_step=8)
    granted = lease(ledger, capacity=3)
    assert lease(ledger, capacity=3) == granted
    assert lease(ledger, capacity=2, held=(granted[1].lease_id,)) == [granted[0], granted[2]]
    assert lease(ledger, capacity=1) == granted[:1]
    assert len(lease(ledger, capacity=5, held=(granted[0].lease_id,))) == 5
    assert ledger.account.counts() == GroupCounts(leased=6)


def test_a_lost_lease_of_a_prompt_that_another_actor_finished_is_not_granted_again(
    open_ledger: Callable[..., Ledger],
) -> None:
    ledger = open_ledger(groups_per_step=1, max_staleness=0)
    (early,) = lease(ledger, "a")
    ledger.expire("session-a")
    lease(ledger, "b")
    commit(ledger, early)
    assert lease(ledger, "b") == []


def test_reopening_raises_the_incarnation_and_expires_leases_until_they_are_reclaimed(
    open_ledger: Callable[..., Ledger],
) -> None:
    before = open_ledger(groups_per_step=4)
    one, two, three = lease(before, capacity=3)
    commit(before, three)
    before.close()
    ledger = open_ledger(groups_per_step=4)
    assert (ledger.run_id, ledger.incarnation) == (before.run_id, before.incarnation + 1)
    ledger.reclaim([one.lease_id, three.lease_id], "session-a")
    ledger.reclaim([two.lease_id], "session-b")
    assert [other.group_id for other in lease(ledger, "b", capacity=2)] == [2, 4]
    ledger.reclaim([two.lease_id], "session-a")
    assert lease(ledger, "a", capacity=9, held=(one.lease_id,))[0].group_id == 5
    assert commit(ledger, one) is Outcome.COMMITTED


def test_a_composition_is_on_disk_before_its_step_and_is_read_back(
    open_ledger: Callable[..., Ledger], tmp_path: Path
) -> None:
    ledger = open_ledger()
    for one in lease(ledger, capacity=2):
        commit(ledger, one)
    composition = Composition(0, (2, 1), (7, 7, 3), 3)
    ledger.commit_batch(composition)
    assert audit(tmp_path / "ledger.sqlite", "SELECT step, group_ids FROM batches") == [(0, "[2, 1]")]
    ledger.close()
    ledger = open_ledger()
    assert ledger.history.batch(0) == composition
    assert ledger.history.batch(1) is None
    assert (ledger.history.expert_cursor(0), ledger.history.expert_cursor(1)) == (0, 3)
    assert ledger.account.counts() == GroupCounts(training=2)
    assert ledger.ready(0, waits_for_oldest=True) == []
    ledger.finish_batch(0, "{}")
    assert ledger.account.counts() == GroupCounts(trained=2)


def test_bodies_are_kept_until_every_kept_checkpoint_covers_their_step(
    open_ledger: Callable[..., Ledger], tmp_path: Path
) -> None:
    ledger = open_ledger(groups_per_step=1, max_staleness=2)
    for step, one in enumerate(lease(ledger, capacity=3)):
        commit(ledger, one)
        if step < 2:
            train(ledger, step)
    ledger.prune_bodies(1)
    assert audit(tmp_path / "ledger.sqlite", "SELECT group_id FROM bodies") == [(2,), (3,)]


def test_something_else_is_done_while_a_transaction_is_committed(
    open_ledger: Callable[..., Ledger], tmp_path: Path
) -> None:
    ledger, on_disk = open_ledger(groups_per_step=4), "SELECT count(*) FROM bodies"
    one, two = lease(ledger, capacity=2)
    seen: list[object] = []

    def look(is_over: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not is_over():
            assert time.monotonic() < deadline, "not committed within 10 s"
        seen.extend(audit(tmp_path / "ledger.sqlite", on_disk))

    with ledger.transaction(while_committing=look):
        pass
    assert seen == [], "there was nothing to commit"
    with ledger.transaction(while_committing=look):
        commit(ledger, one)
    assert seen == [(1,)]

    def fail(is_over: Callable[[], bool]) -> None:
        raise ValueError("meanwhile")

    with pytest.raises(ValueError, match="meanwhile"), ledger.transaction(while_committing=fail):
        commit(ledger, two)
    assert audit(tmp_path / "ledger.sqlite", on_disk) == [(2,)]
    assert commit(ledger, two) is Outcome.REDELIVERED


def test_pace_waits_for_the_oldest_lease_and_drop_passes_it_by(open_ledger: Callable[..., Ledger]) -> None:
    ledger = open_ledger(groups_per_step=2)
    one, two, three = lease(ledger, capacity=3)
    commit(ledger, two)
    commit(ledger, three)
    assert ledger.ready(0, waits_for_oldest=True) == []
    assert ledger.ready(0, waits_for_oldest=False) == [2, 3]
    commit(ledger, one)
    assert ledger.ready(0, waits_for_oldest=True) == [1, 2]


def test_evaluations_are_owed_once_and_finished_once(open_ledger: Callable[..., Ledger]) -> None:
    ledger = open_ledger()
    assert ledger.evaluations.owe(0)
    assert ledger.evaluations.owe(0)
    assert ledger.evaluations.owed() == [0]
    lines = [{"task": "sums", "accuracy": 0.5}, {"task": "law", "accuracy": 0.25}]
    assert ledger.evaluations.finish(0, lines) is Outcome.COMMITTED
    assert ledger.evaluations.finish(0, [{"task": "sums", "accuracy": 0.6}]) is Outcome.REDELIVERED
    assert not ledger.evaluations.owe(0)
    assert ledger.account.evaluations() == lines
    assert ledger.account.num_evaluated_tasks() == 2


def test_a_waived_evaluation_is_never_owed_again_and_leaves_no_line(open_ledger: Callable[..., Ledger]) -> None:
    ledger = open_ledger()
    ledger.evaluations.owe(2)
    assert ledger.evaluations.waive(2)
    assert not ledger.evaluations.waive(4)
    for step in (2, 4):
        assert not ledger.evaluations.owe(step)
        assert ledger.evaluations.finish(step, [{"task": "sums"}]) is Outcome.REDELIVERED
    ledger.evaluations.owe(6)
    ledger.evaluations.finish(6, [{"task": "sums"}])
    assert not ledger.evaluations.waive(6), "expected what was evaluated to stay so"
    assert ledger.account.evaluations() == [{"task": "sums"}]


def test_a_version_s_earlier_hashes_stay_on_record(open_ledger: Callable[..., Ledger], tmp_path: Path) -> None:
    ledger = open_ledger()
    assert [ledger.note_version(3, hash) for hash in ("a", "b", "b", "a", "c")] == ["a", "a", "b", "b", "a"]
    assert ledger.history.version_hashes() == {3: "c"}
    assert ledger.history.replaced_hashes(3) == {"a", "b"}
    with sqlite3.connect(tmp_path / "ledger.sqlite") as database:
        database.create_function("row_digest", -1, lambda *_: b"forged", deterministic=True)
        database.execute("UPDATE replaced_versions SET hash = 'd' WHERE hash = 'a'")
    with pytest.raises(OperatorError, match=r"is damaged \(1 rows of replaced_versions"):
        open_ledger()


def test_a_ledger_from_before_earlier_hashes_were_kept_is_read_and_gone_on_with(
    open_ledger: Callable[..., Ledger], tmp_path: Path
) -> None:
    ledger = open_ledger()
    ledger.note_version(3, "a")
    ledger._db.execute("DROP TABLE replaced_versions")
    ledger.close()
    database = Database(tmp_path / "ledger.sqlite", is_read_only=True)
    assert (History(database).version_hashes(), History(database).replaced_hashes(3)) == ({3: "a"}, set())
    database.close()
    ledger = open_ledger()
    ledger.note_version(3, "b")
    assert ledger.history.replaced_hashes(3) == {"a"}


def test_auditors_read_a_view_of_fixed_columns(open_ledger: Callable[..., Ledger], tmp_path: Path) -> None:
    ledger = open_ledger(groups_per_step=1, max_staleness=2)
    one, two = lease(ledger, capacity=2)
    commit(ledger, one)
    train(ledger, 0)
    commit(ledger, two, min_version=0)
    train(ledger, 1)
    (three,) = lease(ledger, capacity=1)
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as db:
        rows = db.execute("SELECT * FROM audit_groups ORDER BY group_id")
        assert [column[0] for column in rows.description] == [
            "group_id", "lease_id", "actor_id", "state", "reason", "step", "min_version", "staleness",
            "num_trajectories",
        ]  # fmt: skip
        assert rows.fetchall() == [
            (1, one.lease_id, "a", "trained", None, 0, 0, 0, 3),
            (2, two.lease_id, "a", "trained", None, 1, 0, 1, 3),
            (three.group_id, None, "a", "leased", None, None, None, None, 0),
        ]


def test_a_full_disk_is_an_operator_s_error_and_loses_nothing_committed(open_ledger: Callable[..., Ledger]) -> None:
    ledger = open_ledger(groups_per_step=8)
    one, two, three = lease(ledger, capacity=3)
    commit(ledger, one, body=b"one")
    num_pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
    ledger._db._db.execute(f"PRAGMA max_page_count = {num_pages}")

    def commit_and_fill() -> None:
        with ledger.transaction():
            commit(ledger, two, body=b"two")
            ledger.set_fact("much", "m" * (1 << 20))

    with pytest.raises(OperatorError, match=r"ledger\.sqlite: database or disk is full, expected free disk space"):
        commit_and_fill()
    assert ledger.account.counts() == GroupCounts(leased=2, committed=1)
    ledger._db.execute("PRAGMA max_page_count = 1000000")
    assert commit(ledger, two, body=b"2") is commit(ledger, three, body=b"3") is Outcome.COMMITTED
    assert ledger.history.bodies([1, 2, 3]) == [b"one", b"2", b"3"]
    assert ledger.account.num_lost() == 0


def test_no_room_for_tokens_is_an_operator_s_error_and_loses_nothing_committed(
    open_ledger: Callable[..., Ledger],
) -> None:
    ledger = open_ledger(groups_per_step=8)
    one, two, three = lease(ledger, capacity=3)
    commit(ledger, one, body=b"one")
    with files_of_at_most(1 << 20), pytest.raises(OperatorError, match=r"00000001\.bin: File too large, expected free"):
        commit_together(ledger, {three: b"three", two: bytes(2 << 20)})
    assert ledger.account.counts() == GroupCounts(leased=2, committed=1)
    assert commit(ledger, two, body=bytes(2 << 20)) is commit(ledger, three) is Outcome.COMMITTED
    assert ledger.history.bodies([1, 2]) == [b"one", bytes(2 << 20)]
    assert ledger.account.num_lost() == 0


def test_what_is_no_ledger_of_ours_is_refused(open_ledger: Callable[..., Ledger], tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"no database at all, but long enough to have a header" * 40)
    with pytest.raises(OperatorError, match=r"ledger\.sqlite: file is not a database, expected a ledger"):
        open_ledger()
    path.unlink()
    ledger = open_ledger()
    ledger._db.execute("UPDATE facts SET value = '0' WHERE name = 'schema'")
    with pytest.raises(OperatorError, match=r"got ledger schema 0, expected 6"):
        open_ledger()


def flip(path: Path, place: int) -> None:
    """Turn one bit of a file over."""
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 4]))


def test_a_row_that_changed_on_disk_is_named_at_the_next_start(
    open_ledger: Callable[..., Ledger], tmp_path: Path
) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = open_ledger()
    (one,) = lease(ledger, "unmistakable")
    ledger.close()
    place = path.read_bytes().rindex(one.lease_id.encode()) + len(one.lease_id) - 1
    flip(path, place)
    with pytest.raises(OperatorError, match=r"ledger\.sqlite: is damaged"):
        open_ledger()


def test_a_group_whose_tokens_changed_on_disk_is_never_trained(
    open_ledger: Callable[..., Ledger], tmp_path: Path
) -> None:
    ledger = open_ledger(groups_per_step=1)
    (one,) = lease(ledger)
    commit(ledger, one, body=b"unmistakable tokens")
    ledger.close()
    (file,) = (tmp_path / "ledger.bodies").iterdir()
    flip(file, 3)
    ledger = open_ledger(groups_per_step=1)
    with pytest.raises(OperatorError, match=r"00000001\.bin: group 1 is damaged, expected the tokens that came"):
        ledger.history.bodies([1])
    file.unlink()
    with pytest.raises(OperatorError, match=r"00000001\.bin: group 1 is missing"):
        ledger.history.bodies([1])


def test_tokens_are_on_disk_before_their_group_is_committed(open_ledger: Callable[..., Ledger], tmp_path: Path) -> None:
    ledger = open_ledger(groups_per_step=4)
    one, two = lease(ledger, capacity=2)

    def commit_and_fail() -> None:
        with ledger.transaction():
            commit(ledger, one, body=b"never committed")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        commit_and_fail()
    assert not (tmp_path / "ledger.bodies").exists()
    with ledger.transaction():
        commit(ledger, one, body=b"one")
        commit(ledger, two, body=b"two")
    assert (tmp_path / "ledger.bodies" / "00000001.bin").read_bytes() == b"onetwo"
    assert ledger.history.bodies([2, 1]) == [b"two", b"one"]


def test_files_of_tokens_are_deleted_a_checkpoint_after_the_last_of_them_was_forgotten(
    open_ledger: Callable[..., Ledger], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "FILE_BYTES", 3)
    ledger, folder = open_ledger(groups_per_step=1, max_staleness=4), tmp_path / "ledger.bodies"
    for step, one in enumerate(lease(ledger, capacity=4)):
        commit(ledger, one, body=b"body")
        train(ledger, step)
    assert sorted(path.name for path in folder.iterdir()) == [f"0000000{number}.bin" for number in (1, 2, 3, 4)]
    reader = Database(tmp_path / "ledger.sqlite", is_read_only=True)
    with closing(reader), reader.snapshot():
        assert History(reader).bodies([1]) == [b"body"]
        ledger.prune_bodies(2)
        assert History(reader).bodies([1]) == [b"body"]
    ledger.prune_bodies(3)
    assert sorted(path.name for path in folder.iterdir()) == ["00000003.bin", "00000004.bin"]
    assert ledger.history.bodies([4]) == [b"body"]


def test_a_start_writes_no_place_twice(open_ledger: Callable[..., Ledger], tmp_path: Path) -> None:
    for number in (1, 2):
        ledger = open_ledger(groups_per_step=4)
        (one,) = lease(ledger)
        commit(ledger, one, body=b"%d" % number)
        ledger.close()
        with (tmp_path / "ledger.bodies" / f"{number:08d}.bin").open("ab") as file:
            file.write(b"never acknowledged")
    assert open_ledger(groups_per_step=4).history.bodies([1, 2]) == [b"1", b"2"]


@pytest.mark.parametrize("how", ["cut", "flip", "older copy"])
def test_a_ledger_that_lost_acknowledged_transactions_is_refused(
    open_ledger: Callable[..., Ledger], tmp_path: Path, how: str
) -> None:
    path, log = tmp_path / "ledger.sqlite", tmp_path / "ledger.sqlite-wal"
    ledger = open_ledger(groups_per_step=4)
    granted = lease(ledger, capacity=2)
    early = (path.read_bytes(), log.read_bytes())
    for one in granted:
        commit(ledger, one)
    late = (path.read_bytes(), log.read_bytes())
    ledger.close()
    kept = early if how == "older copy" else late
    path.write_bytes(kept[0])
    log.write_bytes(kept[1][: len(kept[1]) - 4200] if how == "cut" else kept[1])
    if how == "flip":
        flip(log, len(kept[1]) - 4200)
    with pytest.raises(OperatorError, match=r"holds \d+ transactions, expected the \d+ that ledger\.mark counts"):
        open_ledger()
    (tmp_path / "ledger.mark").write_bytes(b"0000000000000009 nonsense\n" * 3)
    with pytest.raises(OperatorError, match=r"ledger\.mark: is damaged"):
        open_ledger()
    (tmp_path / "ledger.mark").unlink()
    assert open_ledger(groups_per_step=4).account.counts().leased >= 1


def test_a_rewind_drops_what_came_later_and_leases_its_prompts_again(open_ledger: Callable[..., Ledger]) -> None:
    ledger = open_ledger(groups_per_step=1, max_staleness=3)
    for step, one in enumerate(lease(ledger, capacity=4)):
        commit(ledger, one)
        if step < 3:
            train(ledger, step)
    for step, hash in ((1, "one"), (2, "two"), (1, "one again"), (2, "two again")):
        ledger.note_version(step, hash)
    ledger.evaluations.owe(2)
    ledger.close()
    ledger = open_ledger(groups_per_step=1, max_staleness=3)
    assert ledger.rewind(1) == 3
    assert ledger.account.counts() == GroupCounts(trained=1, dropped=3)
    assert (ledger.account.num_lost(), ledger.account.num_duplicates(), ledger.evaluations.owed()) == (0, 0, [])
    assert ledger.history.batch(1) is None
    assert [ledger.history.replaced_hashes(step) for step in (1, 2)] == [{"one"}, set()]
    assert [one.prompt_index for one in lease(ledger, capacity=4, serving=1)] == [1, 2, 3, 4]


def test_no_more_groups_are_leased_than_the_last_step_takes(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite", groups_per_step=2, max_staleness=4, num_steps=3)
    assert len(lease(ledger, capacity=50)) == 6
    ledger.close()


def test_a_rewind_that_was_cut_short_must_be_done_again(open_ledger: Callable[..., Ledger]) -> None:
    ledger = open_ledger()
    ledger.begin_rewind(0)
    with pytest.raises(OperatorError, match="a rewind was cut short, expected: chord-learner --rewind 0 again"):
        ledger.check_rewind()
    ledger.rewind(0)
    ledger.check_rewind()


@dataclass
class FakeActor:
    """What one actor process knows."""

    name: str
    process: int = 0
    serving: int = 0
    held: dict[str, GrantedLease] = field(default_factory=dict)

    @property
    def session(self) -> str:
        return f"{self.name}-{self.process}"


class LedgerMachine(RuleBasedStateMachine):
    """Actors and a learner that do anything in any order; replies get lost, processes die."""

    @initialize(groups_per_step=st.integers(1, 3), max_staleness=st.integers(0, 3), paced=st.booleans())
    def start(self, groups_per_step: int, max_staleness: int, paced: bool) -> None:
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
        self.G, self.S, self.paced = groups_per_step, max_staleness, paced
        self.ledger = self.open()
        self.actors = [FakeActor(name) for name in "abc"]
        self.step = 0
        self.granted: dict[str, tuple[GrantedLease, int]] = {}
        self.trained: dict[int, int] = {}
        self.acknowledged: set[int] = set()

    def open(self) -> Ledger:
        path = Path(self.folder.name) / "ledger.sqlite"
        return Ledger(path, groups_per_step=self.G, max_staleness=self.S)

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()
            self.folder.cleanup()

    @rule(who=st.integers(0, 2), capacity=st.integers(0, 7), is_lost=st.booleans())
    def ask(self, who: int, capacity: int, is_lost: bool) -> None:
        actor, before = self.actors[who], self.ledger.account.counts()
        known = sum(vars(before).values())
        leases = self.ledger.lease(
            actor.name, actor.session, capacity=capacity, serving_step=actor.serving, held=tuple(actor.held)
        )
        assert len(leases) <= capacity
        assert not {one.lease_id for one in leases} & actor.held.keys()
        assert len({one.group_id for one in leases}) == len(leases)
        fresh = [one.group_id for one in leases if one.group_id > known]
        limit = (actor.serving + self.S + 1) * self.G
        assert fresh == list(range(known + 1, known + 1 + len(fresh)))
        assert not fresh or known + len(fresh) - before.dropped <= limit
        self.granted |= {one.lease_id: (one, actor.serving) for one in leases if one.lease_id not in self.granted}
        if not is_lost:
            actor.held |= {one.lease_id: one for one in leases}

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), is_honest=st.booleans(), is_acknowledged=st.booleans())
    def send(self, data: st.DataObject, is_honest: bool, is_acknowledged: bool) -> None:
        """Any lease ever granted, whether its actor still lives or its group is long trained."""
        one, serving = self.granted[data.draw(st.sampled_from(list(self.granted)))]
        min_version = data.draw(st.integers(min(serving, self.step) if is_honest else 0, self.step))
        self.deliver(one, min_version, is_acknowledged=is_acknowledged)

    def deliver(self, one: GrantedLease, min_version: int, *, is_acknowledged: bool = True) -> None:
        was_leased = self.state_of(one.group_id) == "leased"
        outcome = commit(self.ledger, one, min_version=min_version)
        assert outcome is (Outcome.COMMITTED if was_leased else Outcome.REDELIVERED)
        if outcome is Outcome.COMMITTED:
            self.acknowledged.add(one.group_id)
        for actor in self.actors:
            if is_acknowledged:
                actor.held.pop(one.lease_id, None)

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        self.ledger.expire_lease(data.draw(st.sampled_from(list(self.granted))))

    @rule(who=st.integers(0, 2), is_dead=st.booleans())
    def fall_silent(self, who: int, is_dead: bool) -> None:
        actor = self.actors[who]
        self.ledger.expire(actor.session)
        if is_dead:
            self.actors[who] = FakeActor(actor.name, actor.process + 1, self.step)
        else:
            self.ledger.reclaim(tuple(actor.held), actor.session)

    @rule(who=st.integers(0, 2), data=st.data())
    def refit(self, who: int, data: st.DataObject) -> None:
        actor = self.actors[who]
        actor.serving = data.draw(st.integers(actor.serving, self.step))

    @rule(is_cut_short=st.booleans())
    def cut(self, is_cut_short: bool) -> None:
        group_ids = tuple(self.ledger.ready(self.step, waits_for_oldest=self.paced))
        assert list(group_ids) == sorted(set(group_ids))
        if self.paced:
            leased = self.rows("SELECT coalesce(min(group_id), 1 << 62) FROM groups WHERE state = 'leased'")[0][0]
            assert all(group_id < leased for group_id in group_ids)
        if len(group_ids) < self.G:
            return
        assert not set(group_ids) & self.trained.keys()
        composition = Composition(self.step, group_ids, (), 0)
        self.ledger.commit_batch(composition)
        if is_cut_short:
            self.reopen()
            assert self.ledger.history.batch(self.step) == composition
            assert not set(group_ids) & set(self.ledger.ready(self.step, waits_for_oldest=self.paced))
            self.prune()
        assert len(self.ledger.history.bodies(group_ids)) == self.G
        self.ledger.finish_batch(self.step, "{}")
        self.trained |= dict.fromkeys(group_ids, self.step)
        self.step += 1

    @rule(who=st.integers(0, 2), capacity=st.integers(1, 7), lag=st.integers(0, 5))
    def take_a_turn(self, who: int, capacity: int, lag: int) -> None:
        """What happens when nothing goes wrong, but for tokens that may be older than they ought to be."""
        actor = self.actors[who]
        actor.serving = self.step
        self.ask(who, capacity, is_lost=False)
        for one in [*actor.held.values()]:
            self.deliver(one, max(self.step - lag, 0))
        self.cut(is_cut_short=False)

    @rule()
    def reopen(self) -> None:
        before = self.ledger.incarnation
        self.ledger.close()
        self.ledger = self.open()
        assert self.ledger.incarnation == before + 1
        assert self.rows("SELECT count(*) FROM leases WHERE state = 'active'") == [(0,)]

    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        """Every prompt of the history that is left behind is leased again, before any new one."""
        self.reopen()
        step = data.draw(st.integers(0, self.step))
        behind = "state IN ('leased', 'committed', 'training') OR (state = 'trained' AND step >= ?)"
        prompts = self.rows(f"SELECT prompt_index FROM groups WHERE {behind}", step)
        assert self.ledger.rewind(step) == len(prompts)
        returned = self.rows("SELECT prompt_index FROM returned_prompts")
        assert set(prompts) <= set(returned)
        self.step = step
        self.trained = {group_id: taken for group_id, taken in self.trained.items() if taken < step}
        for actor in self.actors:
            actor.serving = min(actor.serving, step)
        leases = self.ledger.lease("z", "z", capacity=3, serving_step=step, held=())
        assert [one.prompt_index for one in leases] == sorted(index for (index,) in returned)[: len(leases)] or (
            len(leases) > len(returned)
        )
        self.granted |= {one.lease_id: (one, step) for one in leases}
        self.ledger.expire("z")

    @rule()
    def prune(self) -> None:
        self.ledger.prune_bodies(self.step)

    def rows(self, query: str, *parameters: object) -> list[tuple[int, ...]]:
        return self.ledger._db.execute(query, parameters).fetchall()

    def state_of(self, group_id: int) -> object:
        return self.rows("SELECT state FROM audit_groups WHERE group_id = ?", group_id)[0][0]

    @invariant()
    def nothing_is_lost_and_nothing_is_trained_twice(self) -> None:
        assert (self.ledger.account.num_lost(), self.ledger.account.num_duplicates()) == (0, 0)
        ends = "SELECT group_id FROM audit_groups WHERE state = 'leased'"
        assert not self.acknowledged & {group_id for (group_id,) in self.rows(ends)}

    @invariant()
    def staleness_at_training_never_exceeds_the_bound(self) -> None:
        trained = "SELECT group_id, step FROM audit_groups WHERE state = 'trained'"
        assert dict(self.rows(trained)) == self.trained
        assert self.ledger.account.max_trained_staleness() <= self.S

    @invariant()
    def every_prompt_is_in_one_state_and_the_view_counts_as_the_ledger_does(self) -> None:
        counts = self.ledger.account.counts()
        found = dict(self.rows("SELECT state, count(*) FROM audit_groups GROUP BY state"))
        assert GroupCounts(**found) == counts
        group_ids = [group_id for (group_id,) in self.rows("SELECT group_id FROM audit_groups ORDER BY group_id")]
        assert group_ids == list(range(1, sum(vars(counts).values()) + 1))
        assert counts.trained == self.step * self.G
        (without_reason,) = self.rows("SELECT count(*) FROM audit_groups WHERE (state = 'dropped') != (reason NOTNULL)")
        assert without_reason == (0,)

    @invariant()
    def the_tallies_are_what_counting_anew_gives(self) -> None:
        account, tallies = self.ledger.account, self.ledger.tallies
        assert tallies.counts() == account.counts()
        assert [tallies.count(state) for state in vars(account.counts())] == [*vars(account.counts()).values()]
        assert tallies.dropped() == account.dropped()
        orphans = (
            "SELECT group_id, prompt_index FROM groups WHERE state = 'leased' AND group_id NOT IN "
            "(SELECT group_id FROM leases WHERE state = 'active') ORDER BY group_id"
        )
        assert tallies.orphans(limit=1 << 62, count=1 << 62) == self.rows(orphans)

    @invariant()
    def no_prompt_is_in_two_groups_that_are_not_dropped(self) -> None:
        query = "SELECT prompt_index FROM groups WHERE state != 'dropped' GROUP BY prompt_index HAVING count(*) > 1"
        assert self.rows(query) == []

    @invariant()
    def a_prompt_has_one_active_lease_at_most(self) -> None:
        query = "SELECT count(*) FROM leases WHERE state = 'active' GROUP BY group_id ORDER BY 1 DESC LIMIT 1"
        assert self.rows(query) in ([], [(1,)])


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(deadline=None, derandomize=True, max_examples=120, stateful_step_count=40)


@pytest.mark.parametrize("paced", [True, False], ids=["pace", "drop"])
@pytest.mark.parametrize(("groups_per_step", "max_staleness"), [(1, 0), (2, 0), (2, 1), (3, 3)])
def test_a_run_with_slow_and_dying_actors_reaches_its_last_step(
    open_ledger: Callable[..., Ledger], paced: bool, groups_per_step: int, max_staleness: int
) -> None:
    ledger = open_ledger(groups_per_step=groups_per_step, max_staleness=max_staleness)
    chance = random.Random(f"{groups_per_step}{max_staleness}{paced}")
    actors = [FakeActor(name) for name in "abc"]
    step = 0
    for _ in range(2000):
        actor = chance.choice(actors)
        if chance.random() < 0.05:
            ledger.expire(actor.session)
            actors[actors.index(actor)] = FakeActor(actor.name, actor.process + 1, step)
            continue
        actor.serving = step if chance.random() < 0.5 else actor.serving
        for one in ledger.lease(
            actor.name, actor.session, capacity=2, serving_step=actor.serving, held=tuple(actor.held)
        ):
            actor.held[one.lease_id] = one
        if actor.held and chance.random() < 0.7:
            one = actor.held.pop(chance.choice(sorted(actor.held)))
            commit(ledger, one, min_version=actor.serving)
        if len(ledger.ready(step, waits_for_oldest=paced)) == groups_per_step:
            train(ledger, step, paced=paced)
            step += 1
        if step == 20:
            break
    assert step == 20
    assert ledger.account.counts().trained == 20 * groups_per_step
    assert ledger.account.max_trained_staleness() <= max_staleness
    assert (ledger.account.num_lost(), ledger.account.num_duplicates()) == (0, 0)
    if paced:
        assert "stale" not in ledger.account.dropped()
