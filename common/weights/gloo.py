"""Weights over a torch.distributed group of processors: what tests run in the place of NCCL."""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from common.weights.transports import Load, Outline
from common.wire.sockets import address_towards

SENDER = 0
dist: Any = torch.distributed
"""What is used of it has no types."""


class GlooGroup:
    """A group of this process and others, apart from the process's own groups."""

    def __init__(self, store: Any, *, rank: int, size: int, host: str, timeout_s: float) -> None:
        gloo = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host)]
        options._timeout = timedelta(seconds=timeout_s)
        self._store = store
        self._group = gloo(store, rank, size, options)

    def broadcast(self, tensor: Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = SENDER
        self._group.broadcast([tensor], options).wait()


class GlooSender:
    """Listens at `host` for those whom it invited."""

    def __init__(self, *, host: str, timeout_s: float) -> None:
        self._host = host
        self._timeout_s = timeout_s
        self._store: Any = None
        self._group: GlooGroup | None = None

    def invite(self) -> str:
        timeout = timedelta(seconds=self._timeout_s)
        self._store = dist.TCPStore(self._host, 0, None, True, timeout, wait_for_workers=False)
        return f"{self._host}:{self._store.port}"

    def open(self, *, num_receivers: int) -> None:
        self._group = GlooGroup(
            self._store, rank=SENDER, size=num_receivers + 1, host=self._host, timeout_s=self._timeout_s
        )

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        assert self._group, "send before open"
        for _, tensor in tensors:
            self._group.broadcast(tensor.contiguous().view(-1).view(torch.uint8))

    def close(self) -> None:
        self._group = self._store = None


class GlooReceiver:
    """Joins the group of a sender on a machine that it reaches under the host that the invitation names."""

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._group: GlooGroup | None = None

    def join(self, invitation: str, *, rank: int, num_receivers: int) -> None:
        host, _, port = invitation.rpartition(":")
        store = dist.TCPStore(host, int(port), None, False, timedelta(seconds=self._timeout_s))
        self._group = GlooGroup(
            store, rank=rank, size=num_receivers + 1, host=address_towards(host), timeout_s=self._timeout_s
        )

    def receive(self, outlines: Sequence[Outline], load: Load) -> None:
        assert self._group, "receive before join"
        for outline in outlines:
            tensor = torch.empty(outline.shape, dtype=getattr(torch, outline.dtype))
            self._group.broadcast(tensor.view(-1).view(torch.uint8))
            load([(outline.name, tensor)])

    def close(self) -> None:
        self._group = None
