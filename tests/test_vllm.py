"""The vLLM engine, on the real vLLM: what it samples, swaps and leaves behind."""

import asyncio
import dataclasses
import gc
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file
from tiny_model import adapt, make_tiny_model, replay, snapshot_of

from actors.engine import Answer, EngineDead, FinishReason, SamplingParameters
from actors.engines.vllm import VllmEngine
from actors.transfer import TransferClient
from common.config.load import resolve_config
from common.config.schema import Actor
from common.errors import OperatorError
from common.weights.snapshot import Snapshot
from common.wire.ports import is_free
from common.wire.sockets import SocketLimits
from learner.courier.process import Courier

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not importable"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:", "ignore::FutureWarning:"),  # vLLM's own, at import
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),  # ZeroMQ contexts that vLLM leaves open
]

VOCAB_SIZE = 320
END_TOKENS = frozenset({257})
ACTOR = Actor(dtype="float32", max_model_tokens=512, kv_cache_gib=0.05, num_threads=1)
LONG_PROMPT = [(7 * index) % 250 for index in range(300)]
"""Fills two blocks of vLLM's prefix cache."""


class Bench:
    """One engine for all tests of the file, the event loop that it lives in, and two policies."""

    def __init__(self, root: Path) -> None:
        self.folders = {step: make_tiny_model(root / str(step), seed=step) for step in (1, 2)}
        self.snapshots = {
            step: snapshot_of(folder, root / f"{step}.safetensors", step=step) for step, folder in self.folders.items()
        }
        self.engine = VllmEngine(self.folders[1], actor=ACTOR, vocab_size=VOCAB_SIZE, end_tokens=END_TOKENS)
        self._runner = asyncio.Runner()

    def run(self, test: Callable[[], Awaitable[Any]]) -> Any:
        async def limited() -> Any:
            async with asyncio.timeout(600):
                return await test()

        return self._runner.run(limited())

    def close(self) -> None:
        self.run(self.engine.close)
        self._runner.close()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    environment = dict(os.environ)  # vLLM writes into it
    bench = Bench(tmp_path_factory.mktemp("policies"))
    bench.run(bench.engine.start)
    yield bench
    bench.close()
    gc.collect()  # here, where the warnings of what vLLM leaves open are expected
    os.environ.clear()
    os.environ.update(environment)
    assert not engine_processes(os.getpid())


def engine_processes(owner: int) -> list[int]:
    return [child.pid for child in psutil.Process(owner).children(recursive=True) if "EngineCore" in child.name()]


def at_step(snapshot: Snapshot, step: int) -> Snapshot:
    version = snapshot.version.model_copy(update={"step": step})
    return dataclasses.replace(snapshot, manifest=dataclasses.replace(snapshot.manifest, version=version))


async def rounds(engine: VllmEngine, count: int) -> None:
    """Returns once the engine's loop has come round `count` times."""
    for _ in range(count):
        await engine.probe()


async def until_running(engine: VllmEngine, count: int) -> None:
    """Returns once `count` answers have tokens: they have reached the engine process, and it has made steps since."""
    while engine.num_running < count:
        await asyncio.sleep(0)
    await rounds(engine, 3)


def assert_replays(answer: Answer, prompt: list[int], folders: dict[int, Path], temperature: float = 0.0) -> None:
    """Each log-prob is the reference's, for the weights that its version names, on the keys and values before it."""
    logits = replay(folders, prompt, answer.tokens.tolist(), answer.versions.tolist())
    drawn = torch.from_numpy(answer.tokens).long()[:, None]
    expected = torch.log_softmax(logits / (temperature or 1.0), dim=-1).gather(1, drawn)[:, 0]
    np.testing.assert_allclose(answer.logprobs, expected, atol=1e-3)
    if temperature == 0:
        torch.testing.assert_close(logits.gather(1, drawn), logits.amax(dim=1, keepdim=True), atol=1e-3, rtol=0)


def test_it_refuses_to_sample_before_the_first_load(bench: Bench):
    with pytest.raises(RuntimeError, match="no complete weights are loaded"):
        bench.run(lambda: bench.engine.sample([1], SamplingParameters(1.0, 1)))


@pytest.mark.parametrize("step", [2, 1])
def test_log_probs_are_those_of_the_loaded_weights_at_the_temperature(bench: Bench, step: int):
    async def run() -> list[Answer]:
        await bench.engine.load(bench.snapshots[step])
        return await asyncio.gather(
            *(bench.engine.sample([index, 9], SamplingParameters(0.7, 40)) for index in range(8))
        )

    answers = bench.run(run)
    assert bench.engine.version == bench.snapshots[step].version
    for index, answer in enumerate(answers):
        assert set(answer.versions.tolist()) == {step}
        assert_replays(answer, [index, 9], bench.folders, temperature=0.7)


def test_more_prompts_at_once_than_one_pass_takes_are_answered_each_from_its_own_seed(bench: Bench):
    prompts = [[index, *LONG_PROMPT] for index in range(16)]  # 4816 tokens, of which a pass takes 2048

    async def run() -> list[Answer]:
        await bench.engine.load(bench.snapshots[1])
        parameters = [SamplingParameters(1.0, 4, seed=seed) for seed in range(len(prompts))]
        together = await asyncio.gather(*map(bench.engine.sample, prompts, parameters))
        alone = await bench.engine.sample(prompts[-1], parameters[-1])
        assert alone.tokens.tolist() == together[-1].tokens.tolist()
        return together

    for prompt, answer in zip(prompts, bench.run(run), strict=True):
        assert_replays(answer, prompt, bench.folders, temperature=1.0)


def test_adapters_are_served_as_the_model_that_they_make_of_the_base(bench: Bench, tmp_path: Path):
    snapshot, merged = adapt(bench.folders[1], tmp_path, step=9)

    async def run() -> list[Answer]:
        await bench.engine.load(bench.snapshots[2])
        answers = []
        for version in (snapshot, bench.snapshots[1]):  # what is merged is never merged into
            await bench.engine.load(version)
            answers.append(await bench.engine.sample([3, 9], SamplingParameters(0.0, 40)))
        return answers

    for answer in bench.run(run):
        assert_replays(answer, [3, 9], {9: merged, 1: bench.folders[1]})


def test_adapters_of_another_base_keep_the_version(bench: Bench, tmp_path: Path):
    snapshot, _ = adapt(bench.folders[2], tmp_path, step=9)

    async def run() -> None:
        await bench.engine.load(bench.snapshots[1])
        with pytest.raises(OperatorError, match=r"model.path: .* expected .*: the model that the learner adapts"):
            await bench.engine.load(snapshot)
        assert bench.engine.version == bench.snapshots[1].version

    bench.run(run)


def test_filters_for_evaluation_leave_only_the_likeliest_tokens(bench: Bench):
    """The likeliest token alone is left by top-k of 1, and by a top-p below the smallest possible largest p."""

    async def run() -> list[Answer]:
        await bench.engine.load(bench.snapshots[1])
        kinds = [
            SamplingParameters(0.0, 30), SamplingParameters(1.0, 30, top_k=1), SamplingParameters(1.0, 30, top_p=1e-3),
        ]  # fmt: skip
        return await asyncio.gather(*(bench.engine.sample([3, 9], kind) for kind in kinds))

    greedy, *filtered = bench.run(run)
    for answer in filtered:
        assert answer.tokens.tolist() == greedy.tokens.tolist()
        np.testing.assert_allclose(answer.logprobs, 0.0, atol=1e-6)  # of the distribution that it was drawn from


def test_answers_end_with_an_end_token_or_at_their_limit(bench: Bench):
    async def run() -> list[Answer]:
        await bench.engine.load(bench.snapshots[1])
        return await asyncio.gather(
            *(bench.engine.sample([index % 9], SamplingParameters(2.0, 150, index)) for index in range(40))
        )

    answers = bench.run(run)
    assert {answer.finish for answer in answers} == set(FinishReason)
    for answer in answers:
        assert 257 not in answer.tokens[:-1]
        assert (answer.tokens[-1] == 257) == (answer.finish is FinishReason.STOP)
        assert answer.finish is FinishReason.STOP or len(answer.tokens) == 150


def test_weights_change_between_two_tokens_and_the_versions_say_where(bench: Bench):
    """Greedy answers through many loads equal the piecewise reference, which goes on with old keys and values."""
    prompts = [[index, 3, 5] for index in range(4)]

    async def run() -> tuple[list[Answer], int]:
        await bench.engine.load(bench.snapshots[1])
        answers = asyncio.gather(*(bench.engine.sample(prompt, SamplingParameters(0.0, 200)) for prompt in prompts))
        step = 1
        while not answers.done():
            await rounds(bench.engine, 20)
            step += 1
            await bench.engine.load(at_step(bench.snapshots[2 - step % 2], step))
        return await answers, step

    answers, last_step = bench.run(run)
    folders = {step: bench.folders[2 - step % 2] for step in range(1, last_step + 1)}
    assert any(len(set(answer.versions.tolist())) > 1 for answer in answers)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert (np.diff(answer.versions) >= 0).all()
        assert_replays(answer, prompt, folders)


def test_a_load_not_in_flight_lets_answers_end_first(bench: Bench):
    async def run() -> tuple[Answer, Answer]:
        await bench.engine.load(bench.snapshots[1])
        running = asyncio.create_task(bench.engine.sample([4], SamplingParameters(0.0, 200)))
        await until_running(bench.engine, 1)
        load = asyncio.create_task(bench.engine.load(bench.snapshots[2], in_flight=False))
        await asyncio.sleep(0)  # the load has its turn first
        after = asyncio.create_task(bench.engine.sample([4], SamplingParameters(0.0, 20)))
        await load
        assert running.done()
        return await running, await after

    running, after = bench.run(run)
    assert set(running.versions.tolist()) == {1}
    assert set(after.versions.tolist()) == {2}
    assert_replays(after, [4], bench.folders)


def test_it_keeps_nothing_of_the_file_it_loaded(bench: Bench, tmp_path: Path):
    """The next version is made of it, where it lies."""
    loaded = dataclasses.replace(bench.snapshots[2], path=tmp_path / "loaded")
    loaded.path.write_bytes(bench.snapshots[2].path.read_bytes())

    async def run() -> Answer:
        await bench.engine.load(loaded)
        with loaded.path.open("r+b") as file:
            file.write(bytes(loaded.manifest.num_bytes))
        return await bench.engine.sample([1, 9], SamplingParameters(0.0, 20))

    assert_replays(bench.run(run), [1, 9], bench.folders)


def test_new_answers_never_build_on_keys_and_values_of_older_weights(bench: Bench):
    async def sample_with(step: int) -> Answer:
        await bench.engine.load(bench.snapshots[step])
        await bench.engine.sample(LONG_PROMPT, SamplingParameters(0.0, 1))  # fills the prefix cache
        return await bench.engine.sample(LONG_PROMPT, SamplingParameters(0.0, 10))

    for step in (1, 2, 1):
        assert_replays(bench.run(lambda step=step: sample_with(step)), LONG_PROMPT, bench.folders)


def test_a_snapshot_that_does_not_fit_keeps_the_version_and_running_answers(bench: Bench, tmp_path: Path):
    save_file({"model.embed_tokens.weight": torch.zeros(5, 5)}, tmp_path / "wrong")
    wrong = dataclasses.replace(bench.snapshots[2], path=tmp_path / "wrong")

    async def run() -> Answer:
        await bench.engine.load(bench.snapshots[1])
        running = asyncio.create_task(bench.engine.sample([4], SamplingParameters(0.0, 100)))
        with pytest.raises(ValueError, match=r"20 tensors do not fit .* got \(5, 5\), expected \(320, 64\)"):
            await bench.engine.load(wrong)
        with pytest.raises(FileNotFoundError):
            await bench.engine.load(dataclasses.replace(wrong, path=tmp_path / "absent"))
        return await running

    answer = bench.run(run)
    assert bench.engine.version == bench.snapshots[1].version
    assert_replays(answer, [4], bench.folders)


def test_a_load_that_fails_half_way_samples_nothing_until_one_succeeds(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_file({"model.embed_tokens.weight": torch.zeros(5, 5)}, tmp_path / "wrong")
    monkeypatch.setattr("actors.engines.vllm.check_fit", lambda *_, **__: None)

    async def run() -> Answer:
        await bench.engine.load(bench.snapshots[1])
        running = asyncio.create_task(bench.engine.sample([4], SamplingParameters(0.0, 400)))
        await until_running(bench.engine, 1)
        with pytest.raises(Exception, match="collective_rpc"):
            await bench.engine.load(dataclasses.replace(bench.snapshots[2], path=tmp_path / "wrong"))
        assert bench.engine.version is None
        with pytest.raises(RuntimeError, match="ended by abort"):
            await running
        with pytest.raises(RuntimeError, match="no complete weights"):
            await bench.engine.sample([4], SamplingParameters(0.0, 1))
        await bench.engine.load(bench.snapshots[2])
        return await bench.engine.sample([4], SamplingParameters(0.0, 20))

    assert_replays(bench.run(run), [4], bench.folders)


def test_a_caller_that_gives_up_on_a_load_leaves_the_engine_sampling(bench: Bench):
    async def run() -> Answer:
        await bench.engine.load(bench.snapshots[1])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await bench.engine.load(bench.snapshots[2])
        return await bench.engine.sample([4], SamplingParameters(0.0, 20))

    answer = bench.run(run)
    assert set(answer.versions.tolist()) == {2}
    assert_replays(answer, [4], bench.folders)


class Delivery:
    """The learner's courier, over gloo, and the actor's client of it."""

    def __init__(self, engine: VllmEngine) -> None:
        config = resolve_config(None, ["weights.transport=gloo", "learner.num_threads=1"]).config
        limits = SocketLimits(0.5, 2.0, 8 << 20)
        self.courier = Courier(config)
        deadline = time.monotonic() + 300
        while is_free("127.0.0.1", self.courier.port) and time.monotonic() < deadline:
            time.sleep(0.05)  # it has much to import first
        self.client = TransferClient(engine, config.network, config.weights, name="a", limits=limits, keys=None)

    async def bring(self, snapshot: Snapshot) -> bool:
        self.courier.offer(snapshot)
        return await self.client.bring(snapshot.version, self.courier.port)

    def close(self) -> None:
        self.client.close()
        self.courier.close()


def test_what_the_courier_sends_is_sampled_on_from_the_next_token(bench: Bench):
    """Over gloo, which is all that differs from NCCL on a machine without a GPU; a tied head among it."""
    delivery, prompts = Delivery(bench.engine), [[index, 3, 5] for index in range(4)]
    parameters = SamplingParameters(0.0, 200)

    async def run() -> tuple[list[Answer], int]:
        await bench.engine.load(bench.snapshots[1])
        step, answers = 2, list[Answer]()
        assert await delivery.bring(at_step(bench.snapshots[2], step))
        # On a busy machine a delivery may outlast an answer: until one has tokens of several versions.
        while not any(len(set(answer.versions.tolist())) > 1 for answer in answers):
            sampling = asyncio.gather(*(bench.engine.sample(prompt, parameters) for prompt in prompts))
            while not sampling.done():
                await rounds(bench.engine, 20)
                step += 1
                assert await delivery.bring(at_step(bench.snapshots[2 - step % 2], step))
            answers += await sampling
        delivery.client.close()
        return answers, step

    try:
        answers, last_step = bench.run(run)
    finally:
        delivery.close()
    folders = {step: bench.folders[2 - step % 2] for step in range(2, last_step + 1)}
    for number, answer in enumerate(answers):
        assert_replays(answer, prompts[number % len(prompts)], folders)


def test_nothing_is_sampled_on_tensors_that_are_not_those_of_the_hash(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    delivery = Delivery(bench.engine)
    damaged = dataclasses.replace(bench.snapshots[2], path=tmp_path / "damaged")
    data = bytearray(bench.snapshots[2].path.read_bytes())
    damaged.path.write_bytes(data)

    async def run() -> Answer:
        await bench.engine.load(bench.snapshots[1])
        running = asyncio.create_task(bench.engine.sample([4], SamplingParameters(0.0, 400)))
        await until_running(bench.engine, 1)
        delivery.courier.offer(damaged)
        connected = await delivery.client.bring(bench.snapshots[1].version, delivery.courier.port)  # it has read it
        assert not connected
        data[-1000] ^= 1
        damaged.path.write_bytes(data)
        assert not await delivery.client.bring(damaged.version, delivery.courier.port)
        assert bench.engine.version is None
        with pytest.raises(RuntimeError, match="ended by abort"):
            await running
        waiting = asyncio.create_task(bench.engine.sample([4], SamplingParameters(0.0, 20)))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        await bench.engine.load(bench.snapshots[2])
        return await waiting

    try:
        assert_replays(bench.run(run), [4], bench.folders)
    finally:
        delivery.close()
    assert "did not come by gloo" in caplog.text
    assert "fetching it" in caplog.text


def test_an_engine_process_that_is_killed_is_told_by_answers_and_probes(bench: Bench):
    """The last one that uses the bench: no answer comes of it afterwards."""

    async def run() -> None:
        await bench.engine.load(bench.snapshots[1])
        await bench.engine.probe()
        running = asyncio.create_task(bench.engine.sample([4], SamplingParameters(0.0, 400)))
        await until_running(bench.engine, 1)
        (core,) = engine_processes(os.getpid())
        os.kill(core, signal.SIGKILL)
        with pytest.raises(EngineDead, match="its engine process has ended"):
            await running
        with pytest.raises(EngineDead, match="its engine process has ended"):
            await bench.engine.probe()

    bench.run(run)


OWNER = """
import asyncio, sys
from pathlib import Path
from actors.engines.vllm import VllmEngine
from common.config.schema import Actor

async def main():
    actor = Actor(dtype="float32", max_model_tokens=64, kv_cache_gib=0.01, num_threads=1)
    await VllmEngine(Path(sys.argv[1]), actor=actor, vocab_size=320, end_tokens=frozenset()).start()
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_no_engine_process_outlives_an_owner_that_is_killed(tmp_path: Path):
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    folder = make_tiny_model(tmp_path / "model")
    owner = subprocess.Popen(
        [sys.executable, str(script), str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not (children := engine_processes(owner.pid)) and time.monotonic() < deadline:
        assert owner.poll() is None, f"the owner ended by itself, exit code {owner.returncode}"
        time.sleep(0.1)
    owner.send_signal(signal.SIGKILL)  # while it waits for its engine process to be ready
    owner.wait(timeout=10)
    assert children
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in children if psutil.pid_exists(pid)], timeout=30)
    assert not alive, f"{alive} outlived their owner"


def test_an_unknown_release_of_vllm_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch):
    from actors.engines.vllm import check_installation
    from common.errors import OperatorError

    monkeypatch.setattr("vllm.version.__version__", "0.33.1+cpu")
    with pytest.raises(OperatorError, match=r"^vllm: got version 0\.33\.1\+cpu, expected >=0\.32,<0\.33"):
        check_installation()
