"""How many groups an actor works on at a time: as many as its engine bears, found as TCP finds its window."""

from actors.engine import Pressure
from common.wire.messages import MAX_LEASES

FIRST_GROUPS = 4
"""Where it begins; what is too many for a small KV cache falls within the first groups."""
FULL_FRAC = 0.9
"""Of the KV cache in use; beyond it another group would drive others out."""
MOST_WAITING_FRAC = 0.5
"""Of the answers under way; where more of them wait, the engine was given twice what it bears."""


class Concurrency:
    """Additive increase, multiplicative decrease of a limit on groups in flight.

    The evidence is a group's end: it has taken all the room that it ever will.

    - Answers were preempted since the last end, or most of them wait: the limit becomes half of the groups in flight, 1
      at least. Those that were in flight then are no evidence for or against the new limit: until so many have ended,
      it stays.
    - No answer waits, the KV cache has room, and the learner has filled the group's place again: the limit grows by its
      reciprocal, one group each time that all of them have ended; until it first fell, by one at each end.
    - Else it stays: an actor that finds no work has learned nothing of what its engine bears.
    """

    def __init__(self, most: int = 0) -> None:
        """`most` groups at any time; 0: what one actor may hold of leases."""
        self._most = min(most or MAX_LEASES, MAX_LEASES)
        self._limit = float(min(FIRST_GROUPS, self._most))
        self._has_fallen = False
        self._num_old = 0
        """Groups still to end that were in flight when it fell."""
        self._num_vacancies = 0
        """Groups that have ended with room to spare, and whose place was not asked for yet."""
        self._num_preemptions = 0

    @property
    def limit(self) -> int:
        return int(self._limit)

    def note_end(self, pressure: Pressure, *, num_groups: int) -> None:
        """One of `num_groups` in flight, itself among them, was sampled to its end."""
        was_preempted = pressure.num_preemptions > self._num_preemptions
        self._num_preemptions = pressure.num_preemptions
        if self._num_old:
            self._num_old -= 1
        elif was_preempted or pressure.waiting_frac > MOST_WAITING_FRAC:
            self._limit = max(min(num_groups, self._limit) / 2, 1.0)
            self._has_fallen = True
            self._num_old, self._num_vacancies = num_groups - 1, 0
        elif pressure.waiting_frac == 0 and pressure.kv_cache_frac < FULL_FRAC:
            self._num_vacancies += 1

    def note_leases(self, *, asked: int, granted: int) -> bool:
        """The learner has answered a request for `asked` leases. Whether there is room for another group now."""
        if asked == 0:
            return False
        before = self.limit
        if granted == asked:
            growth = self._num_vacancies / (self._limit if self._has_fallen else 1.0)
            self._limit = min(self._limit + growth, float(self._most))
        self._num_vacancies = 0
        return self.limit > before
