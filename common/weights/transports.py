"""The ends of a direct way for weights: the learner's courier sends a version's tensors, an engine's workers receive.

Each engine shares a group of its own with the courier: whoever joins, leaves or hangs is nobody else's concern. What a
group's members must know of it, its invitation, travels over ZeroMQ, as does everything else but the tensors.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Load: TypeAlias = "Callable[[Sequence[tuple[str, Tensor]]], None]"
"""Takes some of the tensors; their memory is used again afterwards."""


@dataclass(frozen=True)
class Outline:
    """What is known of a tensor before it comes."""

    name: str
    dtype: Literal["bfloat16", "float16", "float32", "float64", "uint8"]
    """As torch names it."""
    shape: tuple[int, ...]


class Sender(Protocol):
    """The courier's end of one group."""

    def invite(self) -> str:
        """What the others need to join; known to nobody else."""
        ...

    def open(self, *, num_receivers: int) -> None:
        """Return once all have joined."""
        ...

    def send(self, tensors: "Iterable[tuple[str, Tensor]]") -> None:
        """Return once they have been sent."""
        ...

    def close(self) -> None: ...


class Receiver(Protocol):
    """One worker's end."""

    def join(self, invitation: str, *, rank: int, num_receivers: int) -> None:
        """Leave the group that it was in, if any, and join another."""
        ...

    def receive(self, outlines: Sequence[Outline], load: Load) -> None:
        """Hand all tensors to `load`, in the order of their outlines; return when they are there."""
        ...

    def close(self) -> None:
        """Also from another thread, while `join` or `receive` hangs."""
        ...
