"""Who runs on which cores of this machine, so that learner, actors and evaluator do not fight over them.

`auto` pins only where every process has a set number of threads and all of them find a core of their own; what is left
over is everybody's. Otherwise it pins nobody: cores that lie idle on one side of a wall cannot help on the other, and
which side needs them is not known before (in the demo, on two cores, it is the learner, whose actors idle most of the
time). `split` is for who knows: the learner has learner.num_threads cores, or else half of them, and each of the others
an equal share of the rest; where cores are too few for that, they share all the rest.
"""

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from common.config.schema import Config

LEARNER = "learner"


def share_cores(cores: Sequence[int], config: Config, peers: Sequence[str]) -> dict[str, frozenset[int]]:
    """By component, learner and `peers`; empty where nobody is pinned."""
    per_rank, per_peer = config.learner.num_threads, config.actor.num_threads
    wanted = [per_rank * config.learner.num_ranks, *(per_peer for _ in peers)]
    names = [LEARNER, *peers]
    match config.run.pin_cores:
        case "auto" if all(wanted) and sum(wanted) <= len(cores):
            return _deal(cores, names, wanted)
        case "split" if len(cores) > 1 and peers:
            num_learner = min(wanted[0] or len(cores) // 2, len(cores) - 1)
            num_rest = len(cores) - num_learner
            if num_rest < len(peers):
                rest = frozenset(cores[num_learner:])
                return {LEARNER: frozenset(cores[:num_learner]), **dict.fromkeys(peers, rest)}
            return _deal(cores, names, [num_learner, *(num_rest // len(peers) for _ in peers)])
        case _:
            return {}


def _deal(cores: Sequence[int], names: Sequence[str], counts: Sequence[int]) -> dict[str, frozenset[int]]:
    """To each as many as it is to have, and to all of them what is left over."""
    first, dealt = 0, dict[str, frozenset[int]]()
    for name, count in zip(names, counts, strict=True):
        dealt[name] = frozenset(cores[first : first + count])
        first += count
    rest = frozenset(cores[first:])
    return {name: own | rest for name, own in dealt.items()}


@contextmanager
def handing_down(cores: frozenset[int]) -> Generator[None]:
    """A process that this thread starts inside runs on `cores` from its first moment: a child inherits them.

    They are set here, not in the child: between its start and a call from outside it may have threads already.
    """
    before = os.sched_getaffinity(0)
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def describe_cores(shares: dict[str, frozenset[int]]) -> str:
    """In one line."""
    return ", ".join(f"{name} {','.join(map(str, sorted(own)))}" for name, own in shares.items())
