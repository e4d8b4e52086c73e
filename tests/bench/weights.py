"""Weights from the learner to its actors: bytes and seconds, deltas against full snapshots and a shared folder; and how
long generation pauses for them.

Versions are those of a real training run. Subscribers are processes with the actors' own client, on the loopback; a
version's time runs from its tensors to the moment when the last of them has the file, its hashes checked.
"""

import asyncio
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import zmq
from safetensors.torch import save_file
from torch import Tensor

from common.weights.delta import patch
from common.weights.deltas import make_delta
from common.weights.server import WeightServer
from common.weights.snapshot import Snapshot, is_whole, write_snapshot
from common.wire.sockets import SocketLimits
from learner.ledger.ledger import Ledger
from learner.publisher import Publisher
from learner.recorder import Recorder
from tests.bench.figure import Bar, Figure
from tests.bench.versions import MODEL, ROWS_PER_STEP, Versions, train_versions

Say = Callable[[str], None]
Tensors = dict[str, Tensor]

BYTES_BARS = {1e-6: Bar(at_most=0.01), 1e-5: Bar(at_most=0.04)}
"""By learning rate: bytes of a delta by those of the version."""
FAN_OUT_BAR = Bar(at_most=1.5)
"""Time to all of 4 subscribers by that to one."""
PAUSE_BAR = Bar(at_most=1.0)
NUM_STEPS = 4
NUM_SUBSCRIBERS = (1, 4, 16)
ROUNDS = {1: 6, 4: 6, 16: 3}
"""Publications of each kind, by the number of subscribers; kinds alternate."""
RELAYS, RELAY_WIDTH = 16, 2
"""Subscribers that pass versions on, and to how many each."""
CHUNK_BYTES = 2 << 20
NUM_ANSWERS, ANSWER_TOKENS = 16, 400
LIMITS = SocketLimits(heartbeat_s=1.0, silence_s=4.0, max_frame_bytes=64 << 20)
IN_MEMORY = Path("/dev/shm")


def measure(say: Say) -> list[Figure]:
    figures: list[Figure] = []
    folder = Path(tempfile.mkdtemp(dir=IN_MEMORY if IN_MEMORY.is_dir() else None))
    try:
        for lr in BYTES_BARS:
            say(f"training {NUM_STEPS} steps at lr {lr:g}")
            versions = train_versions(lr, num_steps=NUM_STEPS, folder=folder)
            figures += measure_bytes(versions, folder, say)
            figures += measure_times(versions, folder, say)
        figures += measure_relay(versions, folder, say)
        figures += measure_pause(versions, folder, say)
    finally:
        shutil.rmtree(folder)
    return figures


def write(tensors: Tensors, path: Path, step: int) -> Snapshot:
    return write_snapshot(tensors, path, run_id="bench", incarnation=1, step=step, chunk_bytes=CHUNK_BYTES)


def write_all(versions: Versions, folder: Path) -> list[Snapshot]:
    return [write(tensors, folder / f"{step}.safetensors", step) for step, tensors in enumerate(versions.tensors)]


def measure_bytes(versions: Versions, folder: Path, say: Say) -> list[Figure]:
    """Of every delta, and what its parts cost on one core."""
    lr, started = versions.lr, time.perf_counter()
    snapshots = write_all(versions, folder)
    writing_s, copying_s = (time.perf_counter() - started) / len(snapshots), statistics.median(versions.copy_s)
    sizes, encoding, patching = list[int](), list[float](), list[float]()
    for base, new in pairwise(snapshots):
        started = time.perf_counter()
        delta = make_delta(base, new)
        assert delta
        encoding.append(time.perf_counter() - started)
        sizes.append(delta.num_bytes)
        deltas = [delta.chunk(index) for index in range(new.manifest.num_chunks)]
        delta.file.close()
        old, expected = bytearray(base.path.read_bytes()), new.path.read_bytes()
        started = time.perf_counter()
        for index, one in enumerate(deltas):
            offset, length = new.manifest.chunk_span(index)
            patch(memoryview(old)[offset : offset + length], one)
        patching.append(time.perf_counter() - started)
        assert old == expected, "bit for bit"
    started = time.perf_counter()
    assert is_whole(snapshots[-1])
    hashing_s, num_bytes = time.perf_counter() - started, snapshots[0].manifest.num_bytes
    for snapshot in snapshots:
        snapshot.path.unlink()
    say(
        f"deltas: {', '.join(f'{size / num_bytes:.3%}' for size in sizes)}; copy {copying_s:.2f} s, write and hash "
        f"{writing_s:.2f} s, delta made in {statistics.median(encoding):.2f} s, applied in "
        f"{statistics.median(patching):.2f} s"
    )
    run = f"lr {lr:g}: {len(sizes)} steps of AdamW, {ROWS_PER_STEP} demonstrations each; "
    shares = f"{min(sizes) / num_bytes:.2%} to {max(sizes) / num_bytes:.2%}; bit-exact"
    return [
        Figure(
            f"bytes of a version, lr {lr:g}", "bytes", statistics.mean(sizes), "the full snapshot", num_bytes,
            BYTES_BARS[lr], run + shares,
        ),
        Figure(
            f"the train loop is held by a version, lr {lr:g}", "s", copying_s, "by its file and delta too",
            copying_s + writing_s + statistics.median(encoding),
            conditions=f"copy {copying_s:.2f} s; beside the next step: write and hash {writing_s:.2f} s, make a delta "
            f"{statistics.median(encoding):.2f} s",
        ),
        Figure(
            f"apply a delta, lr {lr:g}", "s", statistics.median(patching), "hash the result", hashing_s,
            conditions="actor, before the pause; one core",
        ),
    ]  # fmt: skip


class Broadcast:
    """A learner's publisher, and a number of subscribers."""

    def __init__(
        self, versions: Sequence[Tensors], folder: Path, *, num_subscribers: int, relay_width: int = 0
    ) -> None:
        self._versions, self._folder, self._step = versions, folder, -1
        self._ledger = Ledger(folder / "ledger.sqlite", groups_per_step=1, max_staleness=0)
        self._server = WeightServer(
            zmq.Context.instance(), host="127.0.0.1", port=0, limits=LIMITS, relay_width=relay_width
        )
        self._publisher = Publisher(
            folder / "learner", self._server, self._ledger, Recorder(folder, self._ledger), every_steps=0,
            last_steps=(), chunk_bytes=CHUNK_BYTES, timeout_s=60.0,
        )  # fmt: skip
        ports, relays = [str(self._server.port), str(self._server.announcements_port)], ["relay"] * (relay_width > 0)
        self._subscribers = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.bench.subscriber", *ports, str(folder / f"subscriber-{number}"), *relays],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for number in range(num_subscribers)
        ]  # fmt: skip
        self._answers()
        self._publish()
        self._order(f"full {self._publisher.settle().version.model_dump_json()}")
        self._answers()

    def seconds(self, kind: str) -> float:
        """From the tensors of the next version to the last subscriber that has it."""
        self._order("file " + str(self._folder / "shared.safetensors") if kind == "file" else kind)
        time.sleep(0.2)  # all of them wait now
        started = time.monotonic()
        if kind == "file":
            self._share()
        else:
            self._publish()
            self._publisher.settle()
        ended = max(map(float, self._answers()))
        (self._folder / "shared.safetensors").unlink(missing_ok=True)
        return ended - started

    @property
    def sent_bytes(self) -> int:
        """By the learner, so far."""
        return self._server.sent_bytes

    def close(self) -> None:
        for process in self._subscribers:
            process.communicate(timeout=30)
        self._publisher.close()
        self._server.close()
        self._ledger.close()

    def _next(self) -> Tensors:
        """There and back again: the way between two versions is the same either way."""
        self._step += 1
        last = len(self._versions) - 1
        return self._versions[last - abs(last - self._step % (2 * last))]

    def _publish(self) -> None:
        self._publisher.publish(self._next(), self._step)

    def _share(self) -> None:
        """What one would write without a weight plane."""
        partial = self._folder / "shared.partial"
        save_file(self._versions[self._step % 2], partial)
        partial.rename(self._folder / "shared.safetensors")

    def _order(self, line: str) -> None:
        for process in self._subscribers:
            assert process.stdin
            process.stdin.write(line + "\n")
            process.stdin.flush()

    def _answers(self) -> list[str]:
        return [process.stdout.readline() for process in self._subscribers if process.stdout]


@contextmanager
def broadcast(
    versions: Sequence[Tensors], folder: Path, *, num_subscribers: int, relay_width: int = 0
) -> Iterator[Broadcast]:
    folder.mkdir()
    made = Broadcast(versions, folder, num_subscribers=num_subscribers, relay_width=relay_width)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(folder)


def measure_times(versions: Versions, folder: Path, say: Say) -> list[Figure]:
    """Kinds alternate, so that a slow moment of the machine hits all alike."""
    figures, one, lr = list[Figure](), 0.0, versions.lr
    for count in NUM_SUBSCRIBERS:
        seconds: dict[str, list[float]] = {"delta": [], "full": [], "file": []}
        with broadcast(versions.tensors, folder / f"{count}-subscribers", num_subscribers=count) as running:
            for _ in range(ROUNDS[count]):
                for kind, found in seconds.items():
                    found.append(running.seconds(kind))
        medians = {kind: statistics.median(found) for kind, found in seconds.items()}
        say(f"lr {lr:g}, {count} subscribers: " + ", ".join(f"{kind} {s:.2f} s" for kind, s in medians.items()))
        one = one or medians["delta"]
        what = f"tensors to all of {count}, lr {lr:g}"
        for kind, name in {"full": "full snapshots", "file": "a shared folder + safetensors"}.items():
            spread = ", ".join(f"{k} {min(seconds[k]):.2f} to {max(seconds[k]):.2f}" for k in ("delta", kind))
            conditions = f"{ROUNDS[count]} each in turn, one machine, files in its memory; {spread}"
            figures.append(Figure(what, "s", medians["delta"], name, medians[kind], conditions=conditions))
        if count == 4:
            conditions = "deltas; learner and all subscribers on 2 cores"
            figures.append(Figure(what, "s", medians["delta"], "to one", one, FAN_OUT_BAR, conditions))
    return figures


def measure_relay(versions: Versions, folder: Path, say: Say) -> list[Figure]:
    """What the learner sends to many, where they pass a version on, and where it sends to each."""
    sent, seconds = dict[int, int](), dict[int, float]()
    for width in (RELAY_WIDTH, 0):
        with broadcast(versions.tensors, folder / "relay", num_subscribers=RELAYS, relay_width=width) as running:
            before = running.sent_bytes
            seconds[width] = statistics.median(running.seconds("delta") for _ in range(ROUNDS[RELAYS]))
            sent[width] = (running.sent_bytes - before) // ROUNDS[RELAYS]
    found = ", ".join(f"{width}: {sent[width]:,} bytes in {seconds[width]:.2f} s" for width in sent)
    say(f"{RELAYS} subscribers, by weights.relay: {found}")
    what = f"bytes of the learner's to all of {RELAYS}, lr {versions.lr:g}"
    times = f"{seconds[RELAY_WIDTH]:.2f} s to the last against {seconds[0]:.2f} s"
    conditions = f"deltas; weights.relay = {RELAY_WIDTH}; {times}"
    return [Figure(what, "bytes", sent[RELAY_WIDTH], "without relays", sent[0], conditions=conditions)]


def measure_pause(versions: Versions, folder: Path, say: Say) -> list[Figure]:
    """From the request to pause until generation goes on, with answers under way; on the vLLM that is installed."""
    snapshots = write_all(versions, folder)
    say(f"{NUM_ANSWERS} answers of vLLM under way, {len(snapshots) - 1} loads")
    pauses = asyncio.run(pauses_of(snapshots))
    say(f"pauses: {', '.join(f'{pause:.2f} s' for pause in pauses)}")
    spread = f"{min(pauses):.2f} to {max(pauses):.2f} s over {len(pauses)} loads, {NUM_ANSWERS} answers under way"
    return [Figure("pause of generation", "s", statistics.median(pauses), "the bar", 1.0, PAUSE_BAR, spread)]


async def pauses_of(snapshots: Sequence[Snapshot]) -> list[float]:
    from actors.engines.vllm import VllmEngine
    from common.chat import Chat
    from common.config.schema import Actor

    chat = Chat(MODEL)
    actor = Actor(max_model_tokens=512, num_threads=torch.get_num_threads())  # pyright: ignore
    # No end token: answers are to be under way at every load.
    engine = VllmEngine(MODEL, actor=actor, vocab_size=chat.vocab_size, end_tokens=frozenset())
    await engine.start()
    answering: list[asyncio.Task[None]] = []
    try:
        await engine.load(snapshots[0])
        clock = Clock(engine._llm)
        answering += [asyncio.create_task(answer_on(engine)) for _ in range(NUM_ANSWERS)]
        for snapshot in snapshots[1:]:
            await asyncio.sleep(2.0)
            assert engine.num_running > 0
            await engine.load(snapshot)
        return clock.pauses
    finally:
        for task in answering:
            task.cancel()
        await asyncio.gather(*answering, return_exceptions=True)
        await engine.close()


async def answer_on(engine: Any) -> None:
    """One answer after the other."""
    from actors.engine import SamplingParameters

    while True:
        await engine.sample(list(range(100, 140)), SamplingParameters(temperature=1.0, max_tokens=ANSWER_TOKENS))


class Clock:
    """Between vLLM's own pause and resume."""

    def __init__(self, llm: Any) -> None:
        self.pauses: list[float] = []
        pause, resume = llm.pause_generation, llm.resume_generation

        async def pause_(**how: Any) -> None:
            self._began = time.perf_counter()
            await pause(**how)

        async def resume_() -> None:
            await resume()
            self.pauses.append(time.perf_counter() - self._began)

        llm.pause_generation, llm.resume_generation = pause_, resume_
