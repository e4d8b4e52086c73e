"""The next step's rows are read while this one is taken, and nothing depends on it."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import OperatorError, WaitTimeout
from common.trajectory import TrajectoryGroup
from learner.ledger.history import Composition
from learner.ledger.leases import DropReason, GrantedLease
from learner.rows import Row
from learner.source import Source
from learner.step_rows import StepReader, StepRows
from tests.test_composition import SAMPLE, Bench, bench, blob_of, group

__all__ = ["bench", "group"]
WAIT_S = 10.0


class WatchedReader(StepReader):
    """Notes what it has read, and in which thread; fails on a step where it is told to."""

    fails_on = -1

    def read(self, composition: Composition) -> StepRows:
        if composition.step == self.fails_on:
            self.done.append((composition, threading.current_thread().name))
            raise OperatorError("group 3 is damaged")
        rows = super().read(composition)
        self.done.append((composition, threading.current_thread().name))
        return rows

    @property
    def done(self) -> list[tuple[Composition, str]]:
        return self.__dict__.setdefault("_done", [])

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + WAIT_S
        while len(self.done) < count:
            assert time.monotonic() < deadline, f"{len(self.done)} readings within {WAIT_S} s, expected {count}"
            time.sleep(0.005)


def watched(made: Bench) -> tuple[Source, WatchedReader]:
    reader = WatchedReader(made.config, made.ledger.history, made.experts, made.chat)
    source = Source(
        made.config, made.ledger, made.experts, reader, describe_peers=lambda: "nobody", check=lambda: None
    )  # fmt: skip
    return source, reader


def lease(made: Bench, count: int) -> list[GrantedLease]:
    return made.ledger.lease("a", "s", capacity=count, serving_step=0, held=())


def send(made: Bench, granted: GrantedLease, group: TrajectoryGroup) -> None:
    made.ledger.commit(granted.lease_id, blob_of(group), SAMPLE)


def same_rows(left: list[Row], right: list[Row]) -> bool:
    def content(row: Row) -> list[bytes]:
        parts = [
            (b.tokens, b.mask, b.behavior_logprobs, np.array([b.advantage, b.temperature, b.is_expert]))
            for b in row.branches
        ]  # fmt: skip
        return [row.prompt.tobytes(), *(part.tobytes() for some in parts for part in some)]

    return [*map(content, left)] == [*map(content, right)]


def test_groups_that_are_there_are_read_before_their_step_is_asked_for_and_no_batch_is_cut_early(
    bench: Callable[..., Bench], group: TrajectoryGroup
) -> None:
    made = bench("algorithm.max_staleness=4", "learner.num_steps=2")
    made.deliver(group, 4)
    source, reader = watched(made)
    source.next_rows(0)
    reader.wait_for(2)
    assert made.ledger.history.batch(1) is None
    rows = source.next_rows(1)
    assert [(composition.step, name == "read-ahead") for composition, name in reader.done] == [(0, False), (1, True)]
    assert made.ledger.history.batch(1) == rows.composition
    assert (rows.composition.group_ids, rows.composition.expert_cursor) == ((3, 4), 4)
    plain = StepReader(made.config, made.ledger.history, made.experts, made.chat).read(rows.composition)
    assert same_rows(rows.rows, plain.rows)
    assert (rows.mu, rows.num_groups_with_signal) == (plain.mu, plain.num_groups_with_signal)


def test_groups_that_come_while_a_step_is_taken_are_read_meanwhile(
    bench: Callable[..., Bench], group: TrajectoryGroup
) -> None:
    made = bench("algorithm.max_staleness=4")
    made.deliver(group, 3)
    source, reader = watched(made)
    source.next_rows(0)
    made.deliver(group, 1)
    reader.wait_for(2)
    assert source.next_rows(1).composition == reader.done[1][0]
    source.close()


def test_a_committed_batch_that_is_taken_again_is_read_ahead_as_well(
    bench: Callable[..., Bench], group: TrajectoryGroup
) -> None:
    made = bench("algorithm.max_staleness=4", "learner.num_steps=2")
    made.deliver(group, 4)
    first = [made.source.next_rows(step) for step in range(2)]
    source, reader = watched(made)
    source.next_rows(0)
    reader.wait_for(2)
    assert reader.done[1] == (first[1].composition, "read-ahead")
    assert same_rows(source.next_rows(1).rows, first[1].rows)


def test_with_drop_a_lease_that_comes_in_before_the_cut_is_in_the_batch_whatever_was_read(
    bench: Callable[..., Bench], group: TrajectoryGroup
) -> None:
    made = bench("algorithm.max_staleness=4", "algorithm.staleness_policy=drop", "learner.num_steps=2")
    one, two, late, four, five = lease(made, 5)
    for granted in (one, two, four, five):
        send(made, granted, group)
    source, reader = watched(made)
    source.next_rows(0)
    reader.wait_for(2)
    assert reader.done[1][0].group_ids == (4, 5)
    send(made, late, group)
    rows = source.next_rows(1)
    assert rows.composition.group_ids == (3, 4)
    assert len(rows.groups) == 2
    assert [composition.group_ids for composition, _ in reader.done] == [(1, 2), (4, 5), (3, 4)]


def test_what_is_wrong_with_a_group_is_told_when_its_step_begins(
    bench: Callable[..., Bench], group: TrajectoryGroup
) -> None:
    made = bench("algorithm.max_staleness=4", "learner.num_steps=2")
    made.deliver(group, 4)
    source, reader = watched(made)
    reader.fails_on = 1
    source.next_rows(0)
    reader.wait_for(2)
    with pytest.raises(OperatorError, match="group 3 is damaged"):
        source.next_rows(1)
    assert reader.done[1][1] == "read-ahead"


def test_the_limit_of_a_wait_counts_from_when_the_train_loop_waits(
    bench: Callable[..., Bench], group: TrajectoryGroup
) -> None:
    made = bench("algorithm.max_staleness=4", "learner.group_timeout_s=0.3")
    made.deliver(group, 3)
    source, _ = watched(made)
    source.next_rows(0)
    time.sleep(0.5)
    started = time.monotonic()
    with pytest.raises(WaitTimeout, match="1 of 2 groups of step 2"):
        source.next_rows(1)
    assert time.monotonic() - started >= 0.3
    source.close()


def test_groups_without_a_signal_that_keep_coming_do_not_end_a_wait(
    bench: Callable[..., Bench], group: TrajectoryGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, now_s = bench("algorithm.max_staleness=4", "learner.start_timeout_s=1"), 0.0
    monkeypatch.setattr("common.wait.time", SimpleNamespace(monotonic=lambda: now_s))

    def deliver() -> None:
        nonlocal now_s
        now_s += 0.75
        if now_s < 9:
            (granted,) = lease(made, 1)
            made.ledger.commit(granted.lease_id, blob_of(group), SAMPLE, drop=DropReason.ZERO_VARIANCE)
        elif now_s < 15:
            (granted,) = lease(made, 1)
            made.ledger.expire_lease(granted.lease_id)

    reader = StepReader(made.config, made.ledger.history, made.experts, made.chat)
    source = Source(made.config, made.ledger, made.experts, reader, describe_peers=lambda: "nobody", check=deliver)
    with pytest.raises(WaitTimeout, match=r"2 of 2 groups of step 1 .*dropped so far: 11 zero_variance"):
        source.next_rows(0)  # actors that fail, on the other hand, do not keep it waiting
    assert 9 < now_s < 12
    source.close()


def test_a_closed_source_reads_no_further(bench: Callable[..., Bench], group: TrajectoryGroup, tmp_path: Path) -> None:
    made = bench("algorithm.max_staleness=4")
    made.deliver(group, 2)
    source, reader = watched(made)
    source.next_rows(0)
    source.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]
    made.deliver(group, 2)
    assert len(reader.done) == 1
