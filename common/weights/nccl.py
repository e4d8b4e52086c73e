"""Weights over vLLM's own NCCL backend, from a GPU of the learner's to those of an engine.

The only file that needs a GPU: everything around it is run with gloo in its place. Imported where it is chosen.
"""

import base64
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from common.errors import OperatorError
from common.weights.transports import Load, Outline

BUFFER_BYTES = 256 << 20
NUM_BUFFERS = 2
"""While one is sent, the next is filled."""
SENDER = 0


def check_gpu() -> None:
    """Raises OperatorError where there is none to send from or to receive on."""
    if not torch.cuda.is_available():
        raise OperatorError('weights.transport: got "nccl", expected it with a GPU, and torch finds none: take "zmq"')


class NcclSender:
    """Tensors go through two buffers on `device`; the model is never whole on it."""

    def __init__(self, *, device: int) -> None:
        self._device = device
        self._id = b""
        self._group: Any = None

    def invite(self) -> str:
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

        self._id = bytes(NCCLLibrary().ncclGetUniqueId().internal)
        return base64.b64encode(self._id).decode()

    def open(self, *, num_receivers: int) -> None:
        from vllm.distributed.weight_transfer import nccl_common

        torch.cuda.set_device(self._device)
        self._group = cast(Any, nccl_common).uid_init_process_group(self._id, SENDER, num_receivers + 1, self._device)

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        packed_nccl_broadcast_producer(
            iterator=((name, tensor.to(f"cuda:{self._device}")) for name, tensor in tensors),
            group=self._group,
            src=SENDER,
            post_iter_func=lambda item: item[1],
            buffer_size_bytes=BUFFER_BYTES,
            num_buffers=NUM_BUFFERS,
        )
        torch.cuda.synchronize(self._device)

    def close(self) -> None:
        if self._group:
            self._group.destroy()
            self._group = None


class NcclReceiver:
    """vLLM's own engine for it, whose model is stood in for, so that what arrives is looked at before it is loaded."""

    def __init__(self, engine: Any) -> None:
        """`engine`: the weight transfer engine in whose place this one receives."""
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        self._device = engine.device
        self._nccl: Any = NCCLWeightTransferEngine(engine.config, engine.vllm_config, engine.device, engine.model)

    def join(self, invitation: str, *, rank: int, num_receivers: int) -> None:
        """vLLM gives each of its workers a rank after `rank_offset` itself."""
        torch.cuda.set_device(self._device)
        self._nccl.shutdown()
        self._nccl.init_transfer_engine(
            self._nccl.init_info_cls(
                rank_offset=SENDER + 1, world_size=num_receivers + 1, nccl_unique_id_b64=invitation, packed=True,
                packed_buffer_size_bytes=BUFFER_BYTES, packed_num_buffers=NUM_BUFFERS,
            )
        )  # fmt: skip

    def receive(self, outlines: Sequence[Outline], load: Load) -> None:
        torch.cuda.set_device(self._device)
        self._nccl.set_weight_update_target(StandIn(load), self._nccl.model_config)
        try:
            self._nccl.receive_weights(
                self._nccl.update_info_cls(
                    names=[one.name for one in outlines],
                    dtype_names=[one.dtype for one in outlines],
                    shapes=[list(one.shape) for one in outlines],
                )
            )
            torch.cuda.synchronize(self._device)
        finally:
            self._nccl.reset_weight_update_target()

    def close(self) -> None:
        """Aborts what hangs in the group."""
        self._nccl.shutdown()


class StandIn:
    """What vLLM's engine asks of a model while it receives."""

    def __init__(self, load: Load) -> None:
        self.load_weights = load
