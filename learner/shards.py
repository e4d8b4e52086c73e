"""ZeRO: what DeepSpeed deals out among the ranks, and parameters that are dealt out (stage 3) made whole for a moment.

Ranks must gather the same parameters in the same order, or each waits for the others for ever. So every rank calls the
same modules equally often, whatever its rows: micro-batches are as many on each, and the head is one module.
"""

import inspect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.errors import OperatorError

BUCKET_BYTES = 256 << 20
"""Parameters that are whole at a time while they are published or hashed."""

OFFLOAD_SINCE = (0, 19, 0)
"""Earlier releases of DeepSpeed lost all micro-batches but one when the optimizer was offloaded (#7967, #7981)."""


@dataclass(frozen=True)
class Sharding:
    """What the ranks share out among them; see the configuration's section `learner`."""

    zero_stage: int = 0
    overlap_comm: bool = False
    offload: Literal["none", "optimizer"] = "none"
    max_whole_entries: int = 10_000
    """Parameters of at most so many entries stay whole on every rank in stage 3: norms and biases."""

    @property
    def shards_parameters(self) -> bool:
        return self.zero_stage == 3

    def section(self) -> dict[str, Any]:
        """What DeepSpeed's configuration says of it."""
        section: dict[str, Any] = {
            "stage": self.zero_stage,
            "overlap_comm": self.overlap_comm,
            "stage3_param_persistence_threshold": self.max_whole_entries,
            "memory_efficient_linear": False,  # it would replace torch's own in the whole process
        }
        if self.offload == "optimizer":
            section["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        return section


def check_offload(sharding: Sharding, device: torch.device) -> None:
    """Raises OperatorError where offloading would train wrongly, or would move nothing."""
    if sharding.offload == "none":
        return
    found = version("deepspeed")
    if tuple(int(part) for part in found.split("+")[0].split(".")[:3]) < OFFLOAD_SINCE:
        needed = ".".join(map(str, OFFLOAD_SINCE))
        raise OperatorError(
            f'learner.offload: got "{sharding.offload}" with DeepSpeed {found}, expected DeepSpeed {needed} or later: '
            "earlier ones lose micro-batches"
        )
    if device.type == "cpu":
        raise OperatorError(
            f'learner.offload: got "{sharding.offload}" on a machine without a GPU, expected "none": '
            "the optimizer is in host memory as it is"
        )


def whole(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
    """Each parameter, whole on this rank while it is looked at; all ranks must go through all of them alike."""
    import deepspeed

    for bucket in _buckets(parameters):
        with deepspeed.zero.GatheredParameters([parameter for _, parameter in bucket]):
            yield from ((name, parameter.detach()) for name, parameter in bucket)


def _buckets(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    bucket: list[tuple[str, nn.Parameter]] = []
    filled = 0
    for name, parameter in parameters:
        num_bytes = getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if bucket and filled + num_bytes > BUCKET_BYTES:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, parameter))
        filled += num_bytes
    if bucket:
        yield bucket


def square_of_shards(parameters: Iterable[nn.Parameter]) -> float:
    """Sum of squares of this rank's shards of the accumulated gradients (stage 3)."""
    from deepspeed.utils import safe_get_local_grad

    return math.fsum(float(safe_get_local_grad(p).square().sum()) for p in parameters)


def forget_module() -> None:
    """Let go of a model of stage 3 in the two places where DeepSpeed's `destroy` leaves it, optimizer and all."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    FWD_MODULE_STACK.clear()
    coordinator: Any = PartitionedParameterCoordinator
    instrumented = coordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(instrumented).nonlocals["func"].cache_clear()
