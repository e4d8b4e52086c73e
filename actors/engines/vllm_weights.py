"""Runs inside vLLM's own processes: loads a snapshot file, or what the courier sends, into the model, and dies with the
actor.

vLLM finds `register` through the entry-point group `vllm.general_plugins` and calls it in every process that it starts.
With actors.engines.vllm and vllm_pressure the only file that reaches vLLM.
"""

import logging
import os
import select
import signal
import threading
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.weights.policy import tensors_of_policy

if TYPE_CHECKING:
    from torch import Tensor

    from actors.engines.vllm_transfer import TransferEnd, TransferOrder

BACKEND = "chord"


def register() -> None:
    """Offer the weight-transfer backend `chord` to vLLM."""
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from actors.engines.vllm_transfer import TransferEnd, TransferOrder, make_receiver

    @dataclass
    class Nothing(WeightTransferInitInfo):
        """There is no connection to set up."""

    @dataclass
    class Update(WeightTransferUpdateInfo):
        """One of the two."""

        path: str = ""
        """A snapshot with every tensor of the policy (a tied head may be left out), or with adapters to its base."""
        transfer: dict[str, Any] | None = None
        """A TransferOrder."""

    class SnapshotTransfer(WeightTransferEngine[Nothing, Update]):
        """All happens in `receive_weights`: nothing before it touches the model, nothing is left to do after it."""

        init_info_cls = Nothing
        update_info_cls = Update

        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self._end = TransferEnd(lambda order: make_receiver(order, self), rank=self.parallel_config.rank)

        def init_transfer_engine(self, init_info: Nothing) -> None: ...

        def start_weight_update(self) -> None: ...

        def finish_weight_update(self) -> None: ...

        def shutdown(self) -> None:
            self._end.close()

        def update_weights(self, update_info: dict[str, Any]) -> None:
            if self.device.type == "cpu":  # the base class synchronises an accelerator that is not there
                self.receive_weights(self.parse_update_info(update_info))
            else:
                super().update_weights(update_info)

        def receive_weights(self, update_info: Update) -> None:
            if update_info.transfer:
                receive_version(self.model, self.model_config, self._end, TransferOrder(**update_info.transfer))
            else:
                load_snapshot(self.model, self.model_config, Path(update_info.path))

    # It warns of layers without weights of their own, tied heads and rotary embeddings, at every load.
    logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, SnapshotTransfer)


def load_snapshot(model: Any, model_config: Any, path: Path) -> None:
    """Adapters are merged into the weights of the folder that the engine was started from."""
    with reloading(model, model_config):
        load_tensors(model, model_config, tensors_of_policy(path, Path(model_config.model)))


def receive_version(model: Any, model_config: Any, end: "TransferEnd", order: "TransferOrder") -> None:
    """Raises where any of it is wrong or late; then the model is half loaded."""

    def load(tensors: "Sequence[tuple[str, Tensor]]") -> None:
        load_tensors(model, model_config, tensors)

    with reloading(model, model_config):
        end.receive(order, load)


def load_tensors(model: Any, model_config: Any, tensors: "Iterable[tuple[str, Tensor]]") -> None:
    model.load_weights((name, tensor.to(model_config.dtype)) for name, tensor in tensors)


@contextmanager
def reloading(model: Any, model_config: Any) -> Generator[None]:
    """All weights are loaded by vLLM's layerwise reload, which also works where linear layers keep only packed ones."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    try:
        yield
    finally:  # also after a failure, so that the next load begins anew
        finalize_layerwise_reload(model, model_config)
    pack_tied_heads(model)


def pack_tied_heads(model: Any) -> None:
    """Pack the head anew: reload skips one that is tied, and on a CPU it would go on with its old packed copy."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


@dataclass(frozen=True)
class Owner:
    """Rides in vLLM's configuration; unpickled in a child process, it ties that process's life to the owner's.

    vLLM's engine process outlives an owner that was killed. The configuration is the first of ours to reach it,
    before it waits for its owner for the first time.
    """

    pid: int

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return die_with, (self.pid,)

    def compute_hash(self) -> str:
        """vLLM hashes its configuration for caches, which this has no part in."""
        return ""


def die_with(pid: int) -> Owner:
    """Have this process killed as soon as process `pid` has ended, however it ended."""
    if pid != os.getpid():
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            threading.Thread(target=_await_end, args=(handle,), name="owner-watch", daemon=True).start()
    return Owner(pid)


def _await_end(handle: int) -> None:
    """A pidfd turns readable when its process ends."""
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    poll.poll()
    os.kill(os.getpid(), signal.SIGKILL)
