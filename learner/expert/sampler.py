"""The order in which expert rows are drawn: without replacement, epoch after epoch, resumable from one integer."""

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def draw(num_rows: int, *, seed: int, cursor: int, count: int) -> list[int]:
    """The next `count` positions in 0..num_rows-1 after the `cursor` drawn so far; the cursor is then `cursor + count`.

    Every epoch of `num_rows` draws is a permutation of its own. Raises ValueError where there is nothing to draw from.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows: got {num_rows}, expected at least 1 expert row to draw from")
    if cursor < 0 or count < 0:
        raise ValueError(f"cursor and count: got {cursor} and {count}, expected neither below 0")
    drawn: list[int] = []
    while len(drawn) < count:
        epoch, offset = divmod(cursor + len(drawn), num_rows)
        rest = permutation(num_rows, seed=seed, epoch=epoch)[offset : offset + count - len(drawn)]
        drawn += rest.tolist()
    return drawn


@lru_cache(maxsize=2)
def permutation(num_rows: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Order of one epoch [num_rows], read-only.

    Positions sorted by their 8 bytes of SHAKE-256(seed, epoch): a fixed function. Shuffles of `random` and numpy may
    change between versions, and a run would then resume with another history.
    """
    digest = hashlib.shake_256(f"{seed}/{epoch}".encode()).digest(8 * num_rows)
    order = np.argsort(np.frombuffer(digest, dtype="<u8"), kind="stable")
    order.flags.writeable = False
    return order
