"""Runs inside vLLM's own processes: receives a version from the courier, which counts only where all of it is right.

A group can hang for ever, so it is used in a thread, which is left behind after the time limit and touches the model no
more from then on.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.errors import WaitTimeout
from common.weights.fingerprint import Fingerprint
from common.weights.gloo import GlooReceiver
from common.weights.transports import Load, Outline, Receiver


@dataclass(frozen=True)
class TransferOrder:
    """What the actor tells its workers; all of it comes from the courier, but for the limit."""

    transport: str
    invitation: str
    """Empty: to stay in the group of last time."""
    num_workers: int
    outlines: list[list[Any]]
    fingerprint: str
    limit_s: float


class TransferEnd:
    """One worker's, for as long as it lives."""

    def __init__(self, make_receiver: Callable[[TransferOrder], Receiver], *, rank: int) -> None:
        """`rank`: the worker's among the receivers, from 0."""
        self._make_receiver = make_receiver
        self._rank = rank
        self._receiver: Receiver | None = None

    def receive(self, order: TransferOrder, load: Load) -> None:
        """Have `load` take all tensors. Raises WaitTimeout, or ValueError where their fingerprint is another one; then
        some of them may have been taken."""
        receiver = self._receiver = self._receiver or self._make_receiver(order)
        gate = Gate(load)

        def run() -> None:
            if order.invitation:
                receiver.join(order.invitation, rank=self._rank + 1, num_receivers=order.num_workers)
            receiver.receive([Outline(name, dtype, tuple(shape)) for name, dtype, shape in order.outlines], gate.take)

        try:
            run_within(order.limit_s, run)
            if (found := gate.fingerprint.hexdigest()) != order.fingerprint:
                raise ValueError(f"weights: got tensors with fingerprint {found}, expected {order.fingerprint}")
        except BaseException:
            gate.close()
            self.close()
            raise

    def close(self) -> None:
        if self._receiver:
            self._receiver.close()
            self._receiver = None


class Gate:
    """Between a receiver and a model: takes the fingerprint of what passes, and lets nothing pass once it is closed."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._is_closed = False
        self.fingerprint = Fingerprint()

    def take(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        with self._lock:
            if self._is_closed:
                raise RuntimeError("weights: tensors came after their time limit")
            for name, tensor in tensors:
                self.fingerprint.add(name, tensor)
            self._load(tensors)

    def close(self) -> None:
        """Return when nothing passes any more."""
        with self._lock:
            self._is_closed = True


def run_within(limit_s: float, action: Callable[[], None]) -> None:
    """Raises what `action` raises, or WaitTimeout; then it is left to itself."""
    errors: list[BaseException] = []
    is_inference = torch.is_inference_mode_enabled()  # a thread does not inherit it

    def run() -> None:
        try:
            with torch.inference_mode(is_inference):
                action()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="transfer", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        raise WaitTimeout(f"waited {limit_s:.0f} s for a version's tensors from the learner's courier")
    if errors:
        raise errors[0]


def make_receiver(order: TransferOrder, engine: Any) -> Receiver:
    """`engine`: vLLM's weight transfer engine of this worker."""
    if order.transport == "gloo":
        return GlooReceiver(timeout_s=order.limit_s)
    from common.weights.nccl import NcclReceiver

    return NcclReceiver(engine)
