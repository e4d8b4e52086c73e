"""The tree by which a version spreads: whom a peer is to ask for it.

Those who ask first are nearest to the root, which is whoever makes the tree. Each version has a tree of its own, so a
peer that has gone is in no later one.
"""

from collections import Counter
from dataclasses import dataclass, field

MAX_TREES = 4
"""Versions that are being spread at a time; the tree of an older one is forgotten."""
MAX_MEMBERS = 4096
"""Of one tree; all others belong to the root."""
ROOT = ""


@dataclass
class Tree:
    """Of one version."""

    members: dict[str, str | None] = field(default_factory=dict[str, str | None])
    """Key name by address, in the order in which they came."""
    num_children: Counter[str] = field(default_factory=Counter[str])


class FanOut:
    """Used by one thread."""

    def __init__(self, width: int) -> None:
        """`width`: children of each, the root included."""
        self._width = width
        self._trees: dict[str, Tree] = {}

    def place(self, address: str, *, version_hash: str, key_name: str | None) -> str:
        """The address of the peer that the one at `address` is to ask; ROOT: here.

        Peers know only a key that they share, so each is sent to one of its own key's name. Whoever asks again has not
        got on with its first place, and belongs to the root.
        """
        tree = self._trees.setdefault(version_hash, Tree())
        while len(self._trees) > MAX_TREES:
            del self._trees[next(iter(self._trees))]
        if address in tree.members or len(tree.members) == MAX_MEMBERS:
            return ROOT
        known = (member for member, name in tree.members.items() if name == key_name)
        parent = next((one for one in (ROOT, *known) if tree.num_children[one] < self._width), ROOT)
        tree.num_children[parent] += 1
        tree.members[address] = key_name
        return parent
