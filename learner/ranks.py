"""The learner's ranks: one process each. Rank 0 hosts ledger, inbox and publisher, and deals the others their share."""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import timedelta

import safetensors.torch
import torch
import torch.distributed as dist

from learner.batch import TrainBatch

NOT_YET = math.inf
"""In the place of a number that rank 0 does not know yet."""
NOT_YET_S = 2.0
"""Between two of them."""


class Ranks:
    """The process group of the learner, and a gloo group beside it for control (NCCL cannot carry host memory)."""

    def __init__(self, device: torch.device, *, timeout_s: float = 1800.0) -> None:
        """`timeout_s`: longest wait of a rank for another one."""
        os.environ.setdefault("RANK", "0")
        os.environ.setdefault("WORLD_SIZE", "1")
        os.environ.setdefault("LOCAL_RANK", "0")
        timeout = timedelta(seconds=timeout_s)
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            if os.environ["WORLD_SIZE"] == "1" and "MASTER_ADDR" not in os.environ:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
            else:
                dist.init_process_group(backend, timeout=timeout)
        self.rank = dist.get_rank()
        self.count = dist.get_world_size()
        self._control = dist.new_group(backend="gloo", timeout=timeout)
        self._said_at = time.monotonic()
        self.on_meeting: Callable[[], None] = lambda: None
        """Called when this rank has heard from the others."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def add_up(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over all ranks, float64."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._control)
        return total.tolist()

    def add_up_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        """Element-wise sum over all ranks, in place, on the device of training."""
        if self.count > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def share_number(self, number: float | None) -> float:
        """Rank 0's number, on every rank; float64, finite. The others wait on for as long as rank 0 says "not yet"."""
        while (shared := self._broadcast(number or 0)) == NOT_YET:
            pass
        return shared

    def say_not_yet(self) -> None:
        """Called all through a wait of rank 0, while the others wait for its number: their limit begins anew."""
        if self.count > 1 and time.monotonic() - self._said_at > NOT_YET_S:
            self._broadcast(NOT_YET)

    def _broadcast(self, number: float) -> float:
        shared = torch.tensor([number], dtype=torch.float64)
        dist.broadcast(shared, src=0, group=self._control)
        self._said_at = time.monotonic()
        self.on_meeting()
        return float(shared)

    def barrier(self) -> None:
        dist.barrier(group=self._control)
        self.on_meeting()

    def deal_batches(self, shares: Sequence[Sequence[TrainBatch]] | None) -> list[TrainBatch]:
        """Rank r gets `shares[r]`; only rank 0 passes them. Tensors travel as safetensors bytes."""
        if self.is_first:
            assert shares is not None
            for rank in range(1, self.count):
                data = torch.frombuffer(bytearray(_to_bytes(shares[rank])), dtype=torch.uint8)
                dist.send(torch.tensor([len(data)], dtype=torch.int64), dst=rank, group=self._control)
                dist.send(data, dst=rank, group=self._control)
            return list(shares[0])
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, src=0, group=self._control)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(data, src=0, group=self._control)
        self.on_meeting()
        return _from_bytes(data.numpy().tobytes())

    def collect(self, values: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        """On rank 0 every rank's `values`, flat float32, where only it passes how many each has; elsewhere nothing."""
        if self.is_first:
            found = [values, *(torch.zeros(size) for size in sizes[1:])]
            for rank, theirs in enumerate(found):
                if rank > 0 and len(theirs):
                    dist.recv(theirs, src=rank, group=self._control)
            return found
        if len(values):
            dist.send(values, dst=0, group=self._control)
        return []

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def _to_bytes(batches: Sequence[TrainBatch]) -> bytes:
    named = {
        f"{i}.{field.name}": torch.as_tensor(getattr(batch, field.name))
        for i, batch in enumerate(batches)
        for field in fields(batch)
    }
    return safetensors.torch.save(named)


def _from_bytes(data: bytes) -> list[TrainBatch]:
    named = safetensors.torch.load(data)
    count = 1 + max((int(name.partition(".")[0]) for name in named), default=-1)
    return [_batch_of({field.name: named[f"{i}.{field.name}"] for field in fields(TrainBatch)}) for i in range(count)]


def _batch_of(values: dict[str, torch.Tensor]) -> TrainBatch:
    """What has no dimension is a number."""
    return TrainBatch(**{name: value if value.ndim else value.item() for name, value in values.items()})
