"""How many groups an actor works on at a time: a limit that rises while its engine has room, and falls where not."""

from collections import deque
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.concurrency import FIRST_GROUPS, Concurrency
from actors.engine import Pressure
from common.wire.messages import MAX_LEASES

unhurried = settings(deadline=None, derandomize=True)
ROOM = Pressure(kv_cache_frac=0.2)
FULL = Pressure(kv_cache_frac=0.97, waiting_frac=0.1)


def turn(concurrency: Concurrency, pressure: Pressure, *, num_groups: int, granted: bool = True) -> None:
    """One group ends, and its place is asked for."""
    concurrency.note_end(pressure, num_groups=num_groups)
    asked = max(concurrency.limit - num_groups + 1, 0)
    concurrency.note_leases(asked=asked, granted=asked if granted else 0)


def overfull(num_preemptions: int) -> Pressure:
    return Pressure(kv_cache_frac=1.0, waiting_frac=0.2, num_preemptions=num_preemptions)


ends = st.tuples(
    st.builds(
        Pressure,
        kv_cache_frac=st.floats(0, 1),
        waiting_frac=st.floats(0, 1),
        num_preemptions=st.integers(0, 20),
    ),
    st.booleans(),
)


def limits(most: int, ends: list[tuple[Pressure, bool]]) -> Iterator[tuple[int, int, Pressure, bool]]:
    """Before and after each end of a group, with what was seen at it."""
    concurrency = Concurrency(most)
    for pressure, granted in ends:
        before = concurrency.limit
        turn(concurrency, pressure, num_groups=before, granted=granted)
        yield before, concurrency.limit, pressure, granted


@unhurried
@given(most=st.integers(0, 40), ends=st.lists(ends, max_size=60))
def test_whatever_happens_the_limit_stays_between_one_and_what_is_allowed(
    most: int, ends: list[tuple[Pressure, bool]]
) -> None:
    for before, after, _, _ in limits(most, ends):
        assert before // 2 <= after <= before + 1
        assert 1 <= after <= (most or MAX_LEASES)


@unhurried
@given(most=st.integers(0, 40), ends=st.lists(ends, max_size=60))
def test_it_never_rises_where_answers_wait_or_the_learner_has_no_work(
    most: int, ends: list[tuple[Pressure, bool]]
) -> None:
    for before, after, pressure, granted in limits(most, ends):
        assert after <= before or (granted and pressure.waiting_frac == 0)


def test_it_doubles_each_round_until_it_first_falls() -> None:
    concurrency = Concurrency()
    for _ in range(FIRST_GROUPS):
        turn(concurrency, ROOM, num_groups=concurrency.limit)
    assert concurrency.limit == 2 * FIRST_GROUPS


def test_it_halves_where_answers_were_preempted_and_then_rises_by_one_group_each_round() -> None:
    concurrency = Concurrency()
    for _ in range(12):
        turn(concurrency, ROOM, num_groups=concurrency.limit)
    turn(concurrency, overfull(3), num_groups=16)
    for num_groups in range(15, 0, -1):
        turn(concurrency, Pressure(num_preemptions=3), num_groups=num_groups)
        assert concurrency.limit == 8
    for expected in (9, 10):
        num_turns = 0
        while concurrency.limit < expected:
            turn(concurrency, Pressure(num_preemptions=3), num_groups=concurrency.limit)
            num_turns += 1
        assert num_turns == pytest.approx(expected - 1, abs=1)


def test_groups_begun_under_the_old_limit_are_not_held_against_the_new_one() -> None:
    concurrency = Concurrency()
    for num_preemptions, num_groups in enumerate((4, 3, 2, 2), start=1):
        concurrency.note_end(overfull(num_preemptions), num_groups=num_groups)
        assert concurrency.limit == 2
    concurrency.note_end(overfull(5), num_groups=2)
    assert concurrency.limit == 1


def test_preemptions_of_long_ago_count_once() -> None:
    concurrency = Concurrency()
    for num_groups in (4, 3, 2, 2, 2):
        turn(concurrency, overfull(5), num_groups=num_groups)
    assert concurrency.limit == 2


def test_where_most_answers_wait_it_falls_and_where_some_wait_or_the_cache_is_full_it_stays() -> None:
    concurrency = Concurrency()
    turn(concurrency, FULL, num_groups=4)
    turn(concurrency, Pressure(kv_cache_frac=0.95), num_groups=4)
    assert concurrency.limit == 4
    turn(concurrency, Pressure(waiting_frac=0.6), num_groups=4)
    assert concurrency.limit == 2


def test_an_actor_that_the_learner_leaves_without_work_learns_nothing() -> None:
    concurrency = Concurrency()
    for _ in range(10):
        turn(concurrency, ROOM, num_groups=4, granted=False)
    concurrency.note_leases(asked=4, granted=4)  # the next step's groups, all at once
    assert concurrency.limit == 4


class KvCache:
    """An engine in miniature: answers take room as they grow; where there is none, the last one begun begins anew."""

    def __init__(self, room: int, group_room: int) -> None:
        self._room, self._group_room = room, group_room
        self._sizes: deque[int] = deque()
        self._num_preemptions = 0

    @property
    def num_groups(self) -> int:
        return len(self._sizes)

    def begin(self, count: int) -> None:
        self._sizes.extend([0] * count)

    def grow(self) -> bool:
        """Everyone who has room takes one more place; whether the oldest group has ended."""
        for index in range(len(self._sizes)):
            if sum(self._sizes) >= self._room:
                if self._sizes[-1]:
                    self._num_preemptions += 1
                self._sizes[-1] = 0
            if index < len(self._sizes) - 1 or sum(self._sizes) < self._room:
                self._sizes[index] += 1
        if self._sizes[0] < self._group_room:
            return False
        self._sizes.popleft()
        return True

    @property
    def pressure(self) -> Pressure:
        return Pressure(min(sum(self._sizes) / self._room, 1.0), num_preemptions=self._num_preemptions)


@pytest.mark.parametrize("num_fitting", [1, 3, 8, 30])
def test_it_finds_what_a_kv_cache_bears(num_fitting: int) -> None:
    """The mean of the later limits lies near the number of whole groups that fit, whatever that is."""
    cache, concurrency, limits = KvCache(num_fitting * 50, 50), Concurrency(), list[int]()
    while len(limits) < 1500:
        asked = max(concurrency.limit - cache.num_groups, 0)
        cache.begin(asked)
        concurrency.note_leases(asked=asked, granted=asked)
        if cache.grow():
            concurrency.note_end(cache.pressure, num_groups=cache.num_groups + 1)
            limits.append(concurrency.limit)
    mean = sum(limits[500:]) / len(limits[500:])
    assert 0.6 * num_fitting <= mean <= 2.2 * num_fitting
