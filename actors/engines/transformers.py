"""The transformers engine: runs wherever torch does. Answers asked for together are decoded together, in one thread.

A batch is left-padded and keeps its keys and values; a row that ends leaves it; new answers join at the next batch.
New weights are copied into the model between two decoding steps, and the batch goes on with the keys and values it has.
"""

import asyncio
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from actors.engine import Answer, EngineDead, FinishReason, Pressure, SamplingParameters, check_prompt
from actors.engines.drawing import draw
from common.config.schema import Actor
from common.version import Version
from common.wait import wait_for
from common.weights.policy import check_fit, tensors_of_policy
from common.weights.snapshot import Snapshot

MAX_ROWS = 64
COLLECT_S = 0.01
"""How long the first answer of a batch waits for others that are asked for with it."""
SHRINK_FRAC = 0.75
"""Ended rows leave the batch, a copy of all keys and values, once no more than this fraction goes on."""
HEAD = "lm_head.weight"
CLOSED = "transformers: the engine is closed"


@dataclass(eq=False)
class Row:
    """One answer in the making."""

    prompt: Sequence[int]
    sampling: SamplingParameters
    max_tokens: int
    random: np.random.Generator
    future: Future[Answer] = field(default_factory=Future)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    def append(self, token: int, logprob: float, version: int, *, is_end: bool) -> None:
        """Take the next token; one that ends the answer resolves the future."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)
        if is_end or len(self.tokens) == self.max_tokens:
            self._finish(FinishReason.STOP if is_end else FinishReason.LENGTH)

    def _finish(self, finish: FinishReason) -> None:
        versions = np.asarray(self.versions, dtype=np.int32)
        logprobs = np.asarray(self.logprobs, dtype=np.float32)
        self.future.set_result(Answer(np.asarray(self.tokens, dtype=np.int32), logprobs, versions, finish))


@dataclass(frozen=True, eq=False)
class Load:
    """Weights that wait to be copied into the model."""

    snapshot: Snapshot
    in_flight: bool
    future: Future[None] = field(default_factory=Future)


class TransformersEngine:
    """A model, a thread that has it to itself, and two queues: answers to begin and weights to load."""

    name = "transformers"

    def __init__(self, model_path: Path, *, actor: Actor, vocab_size: int, end_tokens: frozenset[int]) -> None:
        self._model_path = model_path
        self._actor = actor
        self._vocab_size = vocab_size
        self._end_tokens = end_tokens
        self._version: Version | None = None
        self._rows: deque[Row] = deque()
        self._loads: deque[Load] = deque()
        self._probes: deque[Future[None]] = deque()
        self._num_running = 0
        self._started: Future[None] = Future()
        self._has_work = threading.Event()
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="transformers-engine", daemon=True)

    @property
    def version(self) -> Version | None:
        return self._version

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def pressure(self) -> Pressure:
        """A KV cache grows with its batch, so only those wait for room whom the next full batch leaves out."""
        num_waiting = len(self._rows)
        return Pressure(waiting_frac=max(num_waiting - MAX_ROWS, 0) / max(num_waiting + self._num_running, 1))

    async def start(self) -> None:
        self._thread.start()
        await asyncio.shield(asyncio.wrap_future(self._started))

    async def load(self, snapshot: Snapshot, *, in_flight: bool = True) -> None:
        self._refuse_if_closed()
        load = Load(snapshot, in_flight)
        self._loads.append(load)
        self._has_work.set()
        # Shielded: a caller that gives up does not undo a load that has begun.
        await wait_for(
            asyncio.shield(asyncio.wrap_future(load.future)), f"{snapshot.version} to be loaded",
            whom="the transformers engine", limit_s=self._actor.load_timeout_s,
        )  # fmt: skip

    async def sample(self, prompt: Sequence[int], sampling: SamplingParameters) -> Answer:
        self._refuse_if_closed()
        check_prompt(prompt, vocab_size=self._vocab_size, max_model_tokens=self._actor.max_model_tokens)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        max_tokens = min(sampling.max_tokens, self._actor.max_model_tokens - len(prompt))
        row = Row(prompt, sampling, max_tokens, np.random.default_rng(seed))
        self._rows.append(row)
        self._has_work.set()
        return await asyncio.wrap_future(row.future)

    async def probe(self) -> None:
        if not self._thread.is_alive():
            raise EngineDead("its thread has ended")
        if not self._loads:
            probe: Future[None] = Future()
            self._probes.append(probe)
            self._has_work.set()
            await asyncio.wrap_future(probe)

    async def close(self) -> None:
        self._is_closing = True
        self._has_work.set()
        if self._thread.is_alive() and self._started.done():
            await asyncio.to_thread(self._thread.join)

    def _refuse_if_closed(self) -> None:
        if self._is_closing:
            raise RuntimeError(CLOSED)

    def _work(self) -> None:
        """The thread: takes rows and loads from the queues until the engine is closed."""
        try:
            self._model = load_model(self._model_path, self._actor)
        except Exception as error:
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        while not self._is_closing:
            self._has_work.wait()
            self._has_work.clear()
            self._answer_probes()
            time.sleep(COLLECT_S)
            self._apply_loads(is_between_batches=True)
            while self._rows and not self._is_closing:
                self._decode([self._rows.popleft() for _ in range(min(MAX_ROWS, len(self._rows)))])
                self._apply_loads(is_between_batches=True)
        self._answer_probes()
        for waiting in (*self._rows, *self._loads):
            if waiting.future.set_running_or_notify_cancel():
                waiting.future.set_exception(RuntimeError(CLOSED))

    def _answer_probes(self) -> None:
        while self._probes:
            probe = self._probes.popleft()
            if probe.set_running_or_notify_cancel():
                probe.set_result(None)

    def _apply_loads(self, *, is_between_batches: bool) -> None:
        while self._loads and (is_between_batches or self._loads[0].in_flight):
            load = self._loads[0]
            try:
                copy_weights(load.snapshot.path, self._model, base=self._model_path)
            except Exception as error:
                load.future.set_exception(error)
            else:
                self._version = load.snapshot.version
                load.future.set_result(None)
            finally:
                self._loads.popleft()

    def _decode(self, rows: list[Row]) -> None:
        """Decode `rows` to their ends; what goes wrong ends all of them."""
        rows = [row for row in rows if row.future.set_running_or_notify_cancel()]
        try:
            with torch.inference_mode():
                self._decode_batch(rows)
        except Exception as error:
            for row in rows:
                if not row.future.done():
                    row.future.set_exception(error)
        finally:
            self._num_running = 0

    def _decode_batch(self, rows: list[Row]) -> None:
        device = self._model.device
        inputs, mask = (tensor.to(device) for tensor in pad_left([row.prompt for row in rows]))
        cache = DynamicCache(config=self._model.config)
        while rows:
            self._refuse_if_closed()
            self._answer_probes()
            self._apply_loads(is_between_batches=False)
            if self._version is None:
                raise RuntimeError("transformers: no weights are loaded")
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
            logits = self._model(
                input_ids=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
            ).logits[:, -1]
            tokens, logprobs = draw(logits, [row.sampling for row in rows], [row.random.random() for row in rows])
            for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
                if not row.future.done():
                    row.append(token, logprob, self._version.step, is_end=token in self._end_tokens)
            live = [index for index, row in enumerate(rows) if not row.future.done()]
            self._num_running = len(live)
            if len(live) <= SHRINK_FRAC * len(rows):
                kept = torch.tensor(live, dtype=torch.long, device=device)
                cache.batch_select_indices(kept)
                rows, tokens, mask = [rows[index] for index in live], tokens[kept], mask[kept]
            inputs = tokens[:, None]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)


def load_model(model_path: Path, actor: Actor) -> PreTrainedModel:
    """Called in the engine's thread, the one whose number of OpenMP threads it sets."""
    if actor.num_threads > 0:
        torch.set_num_threads(actor.num_threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = fastest_dtype(device) if actor.dtype == "auto" else actor.dtype
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
    return model.to(device).eval()


def fastest_dtype(device: str) -> str:
    """bfloat16 is the faster where matrix units take it (2.0 times on a CPU with AMX), and the slower elsewhere."""
    return "bfloat16" if device == "cuda" or torch.cpu.get_capabilities().get("amx_bf16", False) else "float32"


@torch.no_grad()
def copy_weights(path: Path, model: PreTrainedModel, *, base: Path) -> None:
    """Copy the policy of a snapshot into `model` once its names and shapes are seen to be the model's.

    A tied head may be missing; adapters are those of the model in the folder `base`.
    """
    weights = model.state_dict()
    optional = {HEAD} if model.config.tie_word_embeddings else set[str]()
    check_fit(path, {name: tuple(weight.shape) for name, weight in weights.items()}, base=base, optional=optional)
    for name, tensor in tensors_of_policy(path, base):
        weights[name].copy_(tensor)


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, T], T the longest prompt."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask
