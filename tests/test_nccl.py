"""What can be known of common.weights.nccl without a GPU: that it asks vLLM for what this release of it offers."""

import base64
import ctypes
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from common.weights.nccl import BUFFER_BYTES, NUM_BUFFERS, SENDER, NcclReceiver
from common.weights.transports import Outline

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not importable"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:", "ignore::FutureWarning:"),  # vLLM's own, at import
]


def test_vllm_is_asked_as_it_wants_to_be_asked() -> None:
    from vllm.distributed.device_communicators import pynccl, pynccl_wrapper
    from vllm.distributed.weight_transfer import nccl_common, nccl_engine, packed_tensor

    def assert_callable_with(function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        inspect.signature(function).bind(*arguments, **named)

    assert_callable_with(nccl_common.uid_init_process_group, bytes(128), SENDER, 2, 0)
    assert_callable_with(
        packed_tensor.packed_nccl_broadcast_producer, iterator=iter(()), group=None, src=SENDER, post_iter_func=None,
        buffer_size_bytes=BUFFER_BYTES, num_buffers=NUM_BUFFERS,
    )  # fmt: skip
    assert_callable_with(pynccl.PyNcclCommunicator.destroy, None)
    for method in ("init_transfer_engine", "receive_weights"):
        assert_callable_with(getattr(nccl_engine.NCCLWeightTransferEngine, method), None, None)
    unique_id = pynccl_wrapper.ncclUniqueId()
    ctypes.memset(ctypes.addressof(unique_id), 0xAB, 128)
    assert bytes(unique_id.internal) == b"\xab" * 128


class WorkersEngine:
    """What a receiver is made from."""

    class config:
        parallel_config = model_config = None

    vllm_config = config
    device = torch.device("cpu")
    model = None


def test_a_receiver_is_vllms_own_engine_and_understands_invitation_and_outlines() -> None:
    receiver = NcclReceiver(WorkersEngine())
    engine = receiver._nccl
    invitation = base64.b64encode(bytes(range(128))).decode()
    joining = engine.init_info_cls(rank_offset=1, world_size=2, nccl_unique_id_b64=invitation, packed=True)
    assert joining.nccl_unique_id_bytes == bytes(range(128))
    outlines = [Outline("a", "bfloat16", (2, 3))]
    update = engine.update_info_cls(
        names=[one.name for one in outlines],
        dtype_names=[one.dtype for one in outlines],
        shapes=[list(one.shape) for one in outlines],
    )
    assert getattr(torch, update.dtype_names[0]) is torch.bfloat16
    receiver.close()
