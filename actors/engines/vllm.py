"""The vLLM engine: all answers of an actor in one continuous batch, on a GPU or a CPU.

With vllm_weights, vllm_transfer and vllm_pressure beside it, and common.weights.nccl, the only file that reaches vLLM,
and only through its public interfaces for RL and statistics. A load:

1. the snapshot's tensor names and shapes are compared with the model's; a wrong snapshot ends here;
2. vLLM pauses and keeps its running answers, or lets them end; new answers wait;
3. its worker reads the file into the model;
4. vLLM resumes and labels every further token with the new version.

Answers that were running go on with the keys and values they have. The prefix cache is salted by the load, so that new
answers never build on keys and values of older weights.
"""

import asyncio
import itertools
import logging
import os
import secrets
import threading
from collections.abc import Awaitable, Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.engine import Answer, EngineDead, FinishReason, Pressure, SamplingParameters, check_prompt
from actors.engines.vllm_pressure import PressureGauge
from actors.engines.vllm_weights import BACKEND, Owner
from actors.transfer import Transfer
from common.config.schema import Actor
from common.errors import OperatorError
from common.version import Version
from common.wait import wait_for
from common.weights.policy import check_fit, check_shapes, shapes_of_base
from common.weights.snapshot import Snapshot

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.async_llm import AsyncLLM

TESTED_RELEASE = ("0", "32")
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Swap:
    """One exchange of weights."""

    version: Version
    update: dict[str, Any]
    """What the workers are told; see vllm_weights."""
    mode: Any
    """What becomes of running answers."""
    begin: Callable[[], Awaitable[None]] | None = None
    """Awaited when all is ready. Where there is one, a failure is followed by a load."""


class VllmEngine:
    """One vLLM engine core in a process of its own, which ends with this one."""

    name = "vllm"

    def __init__(self, model_path: Path, *, actor: Actor, vocab_size: int, end_tokens: frozenset[int]) -> None:
        self._model_path = model_path
        self._actor = actor
        self._vocab_size = vocab_size
        self._end_tokens = sorted(end_tokens)
        self._llm: AsyncLLM | None = None
        self._gauge = PressureGauge()
        self._version: Version | None = None
        self._num_loads = self._num_running = 0
        self._request_ids = itertools.count()
        self._load_turn = asyncio.Lock()
        self._is_open = asyncio.Event()
        """Clear while weights are loaded: new answers wait."""
        self._is_open.set()

    @property
    def version(self) -> Version | None:
        return self._version

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def pressure(self) -> Pressure:
        return self._gauge.pressure

    async def start(self) -> None:
        check_installation()
        set_environment(self._actor.num_threads)
        started: Future[None] = Future()
        # A thread that no exit waits for: a start cannot be cancelled, and an actor that is refused leaves at once.
        threading.Thread(target=self._start, args=(started,), name="vllm-start", daemon=True).start()
        await asyncio.shield(asyncio.wrap_future(started))

    def _start(self, started: "Future[None]") -> None:
        # Set here, not returned: vLLM keeps the frames that it was started from alive, and an AsyncLLM in one of them
        # would be finalised too late, with an error.
        try:
            self._llm = start_vllm(self._model_path, self._actor, self._gauge)
        except Exception as error:
            started.set_exception(error)
        else:
            started.set_result(None)

    async def load(self, snapshot: Snapshot, *, in_flight: bool = True) -> None:
        assert self._llm is not None, "load before start"
        async with self._load_turn:
            tied = self._llm.model_config.hf_config.tie_word_embeddings
            base = self._model_path
            check_fit(snapshot.path, shapes_of_base(base), base=base, optional={HEAD} if tied else set())
            swap = Swap(snapshot.version, {"path": str(snapshot.path.resolve())}, mode="keep" if in_flight else "wait")
            # Shielded: a caller that gives up must not leave vLLM paused or half loaded.
            with named_death():
                await asyncio.shield(self._swap(self._llm, swap))

    async def receive(self, transfer: Transfer, *, begin: Callable[[], Awaitable[None]]) -> None:
        """Load a version that the courier sends once `begin` has told it to, under running answers.

        Raises where it fails. Then answers end, and new ones wait for the next `load`.
        """
        assert self._llm is not None, "receive before start"
        async with self._load_turn:
            tied, base = self._llm.model_config.hf_config.tie_word_embeddings, self._model_path
            optional = {HEAD} if tied else set[str]()
            check_shapes(transfer.shapes, shapes_of_base(base), where="the courier", base=base, optional=optional)
            swap = Swap(transfer.version, {"transfer": transfer.order(self.num_workers)}, mode="keep", begin=begin)
            with named_death():
                await asyncio.shield(self._swap(self._llm, swap))

    @property
    def num_workers(self) -> int:
        """Processes that share the model."""
        return self._llm.vllm_config.parallel_config.world_size if self._llm else 1

    async def _swap(self, llm: "AsyncLLM", swap: "Swap") -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        step, mode = swap.version.step, swap.mode
        update = WeightTransferUpdateRequest(swap.update)
        self._is_open.clear()
        try:
            await self._within(llm.pause_generation(mode=mode, clear_cache=False), f"a pause (version {step})")
            try:
                await self._within(llm.start_weight_update(), f"the begin of an update (version {step})")
                if swap.begin:
                    await swap.begin()
                await self._within(llm.update_weights(update), f"an update of its weights (version {step})")
                label = label_of(swap.version)
                await self._within(llm.finish_weight_update(weight_version=label), f"an update's end (version {step})")
            except Exception:
                self._version = (
                    None  # the tensors were right, so the weights are half loaded: no token may come of them
                )
                await self._within(llm.pause_generation(mode="abort"), "the end of answers on half loaded weights")
                raise
            self._version = swap.version
            self._num_loads += 1
            await self._within(llm.resume_generation(), f"a new begin (version {step})")
        finally:
            if self._version or swap.begin is None:
                self._is_open.set()

    async def _within(self, awaited: Awaitable[None], phase: str) -> None:
        await wait_for(awaited, phase, whom="the vllm engine", limit_s=self._actor.load_timeout_s)

    async def sample(self, prompt: Sequence[int], sampling: SamplingParameters) -> Answer:
        from vllm.inputs.engine import tokens_input

        await self._is_open.wait()
        assert self._llm is not None, "sample before start"
        check_prompt(prompt, vocab_size=self._vocab_size, max_model_tokens=self._actor.max_model_tokens)
        if self._version is None:
            raise RuntimeError("vllm: no complete weights are loaded")
        request = tokens_input(list(prompt), cache_salt=str(self._num_loads))
        request_id = str(next(self._request_ids))
        self._num_running += 1
        try:
            with named_death():
                outputs = [out async for out in self._llm.generate(request, self._parameters(sampling), request_id)]
        finally:
            self._num_running -= 1
        return to_answer(outputs[-1].outputs[0])

    async def probe(self) -> None:
        assert self._llm is not None, "probe before start"
        if self._is_open.is_set():
            with named_death():
                await self._llm.check_health()
                await self._llm.is_paused()  # a round trip: the engine process answers between two steps

    def _parameters(self, sampling: SamplingParameters) -> "SamplingParams":
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            logprobs=0,  # of the sampled token only
            stop_token_ids=self._end_tokens,
            ignore_eos=True,  # exactly `end_tokens` end an answer, whatever the model folder says
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    async def close(self) -> None:
        llm, self._llm, self._version = self._llm, None, None
        if llm is not None:
            logging.getLogger("vllm").setLevel(logging.CRITICAL)  # it reports the end that it was asked for as a death
            await asyncio.to_thread(llm.shutdown)


@contextmanager
def named_death() -> Generator[None]:
    """vLLM's own words for it point to a stack trace."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineDead("its engine process has ended") from error


def check_installation() -> None:
    """Refuse a vLLM that this file was not tested with, and one that would not find our weight loader."""
    from vllm.version import __version__ as found

    if tuple(found.split(".")[:2]) != TESTED_RELEASE:
        raise OperatorError(f"vllm: got version {found}, expected >=0.32,<0.33, the range that chord-rl is tested with")
    if not any(entry.module == "actors.engines.vllm_weights" for entry in entry_points(group="vllm.general_plugins")):
        raise OperatorError(
            "vllm: does not find the weight loader of chord-rl, expected `pip install chord-rl` in its environment"
        )


def set_environment(num_threads: int) -> None:
    """What vLLM and its child processes read from the environment; an operator's own settings of the defaults stay."""
    if num_threads > 0:
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # Owner must be pickled, a GPU's context must not be forked
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Idle OpenMP threads sleep soon: where engines and learner share cores, spinning ones slow each other down tenfold.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def start_vllm(model_path: Path, actor: Actor, gauge: PressureGauge) -> "AsyncLLM":
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    on_platform = cpu_arguments(actor) if current_platform.is_cpu() else gpu_arguments(actor)
    arguments = AsyncEngineArgs(
        model=str(model_path),
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype=actor.dtype,
        seed=secrets.randbelow(2**31),  # the default would have every actor draw the same numbers
        max_model_len=actor.max_model_tokens,
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=True,
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        additional_config=Owner(os.getpid()),  # pyright: ignore[reportArgumentType] -- vLLM's own type is wider
        disable_log_stats=True,  # but for those that the gauge reads
        use_tqdm_on_load=False,
        **on_platform,
    )
    return AsyncLLM.from_engine_args(arguments, stat_loggers=[gauge.stat_logger])


def cpu_arguments(actor: Actor) -> dict[str, Any]:
    """Quick to start, small, and its threads bound to no core, so that several engines share a machine."""
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    return {
        "kv_cache_memory_bytes": int(actor.kv_cache_gib * 2**30),  # the environment variable takes whole GiB only
        "max_num_seqs": 64,
        "enforce_eager": True,
        # A seeded answer whose prompt is split over two passes ends the engine: a CPU's generator cannot be set back.
        "enable_chunked_prefill": False,
        # As a class: the name "uni" would be turned into "mp", one process more, which binds its threads to cores.
        "distributed_executor_backend": UniProcExecutor,
    }


def gpu_arguments(actor: Actor) -> dict[str, Any]:
    return {"gpu_memory_utilization": actor.gpu_memory_frac}


def label_of(version: Version) -> str:
    """vLLM's name of a version: its step first, then what else tells it from others of that step."""
    return f"{version.step}/{version.incarnation}/{version.hash}"


def to_answer(output: "CompletionOutput") -> Answer:
    if output.finish_reason not in tuple(FinishReason):
        raise RuntimeError(f"vllm: an answer ended by {output.finish_reason}, expected stop or length")
    assert output.logprobs is not None
    assert output.weight_versions is not None
    tokens = np.asarray(output.token_ids, dtype=np.int32)
    logprobs = [float(at[token].logprob) for at, token in zip(output.logprobs, output.token_ids, strict=True)]
    versions = np.full(len(tokens), -1, dtype=np.int32)
    for span in output.weight_versions:
        versions[span.start : span.end] = int(span.version.split("/")[0])
    assert (versions >= 0).all(), f"tokens without a version: {output.weight_versions}"
    return Answer(tokens, np.asarray(logprobs, dtype=np.float32), versions, FinishReason(output.finish_reason))
