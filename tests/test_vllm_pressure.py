"""How full the real vLLM says it is, and what an actor makes of it: one engine with a very small KV cache."""

import asyncio
import gc
import importlib.util
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from tiny_model import make_tiny_model, snapshot_of

from actors.concurrency import FIRST_GROUPS, Concurrency
from actors.engine import Pressure, SamplingParameters
from actors.engines.vllm import VllmEngine
from actors.engines.vllm_pressure import PressureGauge
from common.config.schema import Actor
from common.side_port import LibraryMetrics

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not importable"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:", "ignore::FutureWarning:"),  # vLLM's own, at import
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),  # ZeroMQ contexts that vLLM leaves open
]

BLOCK_TOKENS = 128
NUM_BLOCKS = 9
"""One of them vLLM keeps for itself."""
BLOCK_BYTES = BLOCK_TOKENS * 1024
"""Keys and values of the tiny model: 2 layers, 2 heads of 32, 4 bytes a number."""
ACTOR = Actor(
    dtype="float32", max_model_tokens=512, num_threads=1, kv_cache_gib=NUM_BLOCKS * BLOCK_BYTES / 2**30
)  # fmt: skip

Run = Callable[[Callable[[VllmEngine], Awaitable[Any]]], Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a test with the engine that all of them share, in its event loop."""
    environment = dict(os.environ)  # vLLM writes into it
    folder = make_tiny_model(tmp_path_factory.mktemp("policy"), seed=1)
    engine = VllmEngine(folder, actor=ACTOR, vocab_size=320, end_tokens=frozenset())
    with asyncio.Runner() as runner:

        async def begin() -> None:
            async with asyncio.timeout(600):
                await engine.start()
                await engine.load(snapshot_of(folder, folder / "1.snapshot", step=1))

        async def limited(test: Callable[[VllmEngine], Awaitable[Any]]) -> Any:
            async with asyncio.timeout(600):
                return await test(engine)

        runner.run(begin())
        yield lambda test: runner.run(limited(test))
        runner.run(engine.close())
    gc.collect()  # here, where the warnings of what vLLM leaves open are expected
    os.environ.clear()
    os.environ.update(environment)


async def limits_of(engine: VllmEngine, *, num_groups: int, group_size: int, max_tokens: int) -> list[int]:
    """How many groups an actor with endless leases works on at a time, as each of `num_groups` ends."""
    concurrency, running, limits = Concurrency(), set[asyncio.Future[Any]](), list[int]()
    while len(limits) < num_groups:
        asked = max(concurrency.limit - len(running), 0)
        for _ in range(asked):
            answers = (engine.sample([7, 8, 9], SamplingParameters(1.0, max_tokens)) for _ in range(group_size))
            running.add(asyncio.gather(*answers))
        concurrency.note_leases(asked=asked, granted=asked)
        done, pending = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for ended in range(len(done)):
            concurrency.note_end(engine.pressure, num_groups=len(running) - ended)
            limits.append(concurrency.limit)
        running = pending
    await asyncio.gather(*running)
    return limits


def test_it_tells_how_full_its_kv_cache_is_and_who_waits(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[Pressure]()
    read = PressureGauge.read

    def read_and_note(gauge: PressureGauge, *statistics: Any) -> None:
        read(gauge, *statistics)
        seen.append(gauge.pressure)

    async def sample(engine: VllmEngine) -> Pressure:
        """16 answers want a block each, of which there are 8."""
        await asyncio.gather(*(engine.sample([7, 8, 9], SamplingParameters(1.0, 60)) for _ in range(16)))
        return engine.pressure

    monkeypatch.setattr(PressureGauge, "read", read_and_note)
    assert run(sample) == seen[-1]
    assert any(pressure.kv_cache_frac == 1.0 and pressure.waiting_frac == 0.5 for pressure in seen)
    assert seen[-1].kv_cache_frac < 1.0
    assert seen[-1].num_preemptions == 0


def test_vllms_own_metrics_are_served_beside_those_of_the_actor(run: Run) -> None:
    def tokens() -> float:
        samples = [sample for family in LibraryMetrics().collect() for sample in family.samples]
        return sum(sample.value for sample in samples if sample.name == "vllm:generation_tokens_total")

    async def sample(engine: VllmEngine) -> int:
        return len((await engine.sample([7, 8, 9], SamplingParameters(1.0, 20))).tokens)

    before = tokens()
    num_sampled = run(sample)
    assert tokens() - before == num_sampled


def test_an_actor_takes_on_more_groups_where_the_kv_cache_has_room(run: Run) -> None:
    """Answers of one block each: 8 of them fit."""
    limits = run(lambda engine: limits_of(engine, num_groups=24, group_size=1, max_tokens=30))
    assert min(limits) >= FIRST_GROUPS
    assert limits[-1] > FIRST_GROUPS


def test_an_actor_backs_off_where_the_kv_cache_is_too_small(run: Run) -> None:
    """There is room for one group: 4 answers of 200 tokens take two blocks each."""

    async def work(engine: VllmEngine) -> tuple[list[int], int]:
        limits = await limits_of(engine, num_groups=12, group_size=4, max_tokens=200)
        return limits, engine.pressure.num_preemptions

    limits, num_preemptions = run(work)
    assert max(limits) <= FIRST_GROUPS
    assert limits[-1] <= 2
    assert num_preemptions > 0
