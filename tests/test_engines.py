"""What every engine promises, held against the engines that run anywhere; and what each of them promises alone."""

import asyncio
import dataclasses
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_model import make_tiny_model, replay, snapshot_of
from transformers import AutoModelForCausalLM

from actors.engine import Answer, Engine, FinishReason, SamplingParameters
from actors.engines.choose import make_engine
from actors.engines.drawing import draw
from common.config.schema import Actor, EngineKind
from common.errors import WaitTimeout
from common.weights.snapshot import Snapshot, write_snapshot

T = TypeVar("T")
VOCAB_SIZE = 320
END_TOKENS = frozenset(range(40))  # many, so that random answers end early
ACTOR = Actor(dtype="float32", max_model_tokens=256, tokens_per_s=1000.0, num_threads=1)
KINDS = [EngineKind.TRANSFORMERS, EngineKind.SIMULATED]


@dataclass(frozen=True)
class Policies:
    """Two tiny models and their snapshots, versions 1 and 2."""

    folders: dict[int, Path]
    snapshots: dict[int, Snapshot]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    root = tmp_path_factory.mktemp("policies")
    folders = {step: make_tiny_model(root / str(step), seed=step) for step in (1, 2)}
    return Policies(
        folders, {step: snapshot_of(folders[step], root / f"{step}.safetensors", step=step) for step in (1, 2)}
    )


@asynccontextmanager
async def running(
    kind: EngineKind, policies: Policies, end_tokens: frozenset[int] = END_TOKENS
) -> AsyncIterator[Engine]:
    engine = make_engine(
        kind, model_path=policies.folders[1], actor=ACTOR, vocab_size=VOCAB_SIZE, end_tokens=end_tokens
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def within_a_minute(test: Callable[[], Awaitable[T]]) -> T:
    async def limited() -> T:
        async with asyncio.timeout(60):
            return await test()

    return asyncio.run(limited())


def prompts(count: int) -> list[list[int]]:
    """Of different lengths, all different."""
    return [[50 + index] * (1 + 3 * index) for index in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_concurrent_answers_come_complete_and_end_where_they_must(kind: EngineKind, policies: Policies):
    async def run() -> None:
        async with running(kind, policies) as engine:
            await engine.load(policies.snapshots[1])
            answers = await asyncio.gather(
                *(engine.sample(prompt, SamplingParameters(1.0, 20, seed)) for seed, prompt in enumerate(prompts(16)))
            )
        for answer in answers:
            assert 1 <= len(answer.tokens) == len(answer.logprobs) == len(answer.versions) <= 20
            assert [array.dtype for array in (answer.tokens, answer.logprobs, answer.versions)] == [
                np.int32,
                np.float32,
                np.int32,
            ]
            assert (answer.logprobs <= 0).all()
            assert set(answer.versions.tolist()) == {1}
            assert not set(answer.tokens[:-1].tolist()) & END_TOKENS
            assert (answer.finish is FinishReason.STOP) == (int(answer.tokens[-1]) in END_TOKENS)
            assert answer.finish is FinishReason.STOP or len(answer.tokens) == 20
        assert {answer.finish for answer in answers} == set(FinishReason)

    within_a_minute(run)


def test_answers_that_even_the_next_full_batch_leaves_out_wait_for_room(
    policies: Policies, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("actors.engines.transformers.MAX_ROWS", 2)

    async def run() -> None:
        async with running(EngineKind.TRANSFORMERS, policies, frozenset()) as engine:
            await engine.load(policies.snapshots[1])
            assert engine.pressure.waiting_frac == 0
            asked = [
                asyncio.create_task(engine.sample(prompt, SamplingParameters(1.0, 200, 0))) for prompt in prompts(6)
            ]
            while engine.num_running < 2:
                await asyncio.sleep(0)
            assert engine.pressure.waiting_frac == pytest.approx(2 / 6)
            await asyncio.gather(*asked)
            assert engine.pressure.waiting_frac == 0

    within_a_minute(run)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_repeats_an_answer(kind: EngineKind, policies: Policies):
    async def run() -> None:
        async with running(kind, policies, frozenset()) as engine:
            await engine.load(policies.snapshots[1])
            first, again, other = [
                await engine.sample([60, 61], SamplingParameters(1.0, 30, seed)) for seed in (7, 7, 8)
            ]
        assert first.tokens.tolist() == again.tokens.tolist() != other.tokens.tolist()
        np.testing.assert_allclose(first.logprobs, again.logprobs, atol=1e-5)

    within_a_minute(run)


@pytest.mark.parametrize("kind", KINDS)
def test_versions_rise_in_flight_and_never_fall(kind: EngineKind, policies: Policies):
    async def run() -> None:
        async with running(kind, policies, frozenset()) as engine:
            answers, last_step = await sample_through_loads(engine, policies.snapshots)
        assert any(len(set(answer.versions.tolist())) > 1 for answer in answers)
        for answer in answers:
            assert (np.diff(answer.versions) >= 0).all()
            assert answer.versions[-1] <= last_step

    within_a_minute(run)


async def until_running(engine: Engine, count: int) -> None:
    """Returns once `count` answers are under way."""
    while engine.num_running < count:
        await asyncio.sleep(0)


async def sample_through_loads(engine: Engine, snapshots: dict[int, Snapshot]) -> tuple[list[Answer], int]:
    """Answers to four prompts while weights change again and again: odd versions are policy 1, even ones policy 2."""
    await engine.load(snapshots[1])
    answers = asyncio.gather(*(engine.sample(prompt, SamplingParameters(0.0, 200, seed=1)) for prompt in prompts(4)))
    step = 1
    while not answers.done():
        step += 1
        await engine.load(at_step(snapshots[2 - step % 2], step))
        for _ in range(4):  # rounds of the engine's loop
            await engine.probe()
    return await answers, step


def at_step(snapshot: Snapshot, step: int) -> Snapshot:
    version = snapshot.version.model_copy(update={"step": step})
    return dataclasses.replace(snapshot, manifest=dataclasses.replace(snapshot.manifest, version=version))


@pytest.mark.parametrize("kind", KINDS)
def test_a_load_not_in_flight_lets_answers_end_first(kind: EngineKind, policies: Policies):
    async def run() -> None:
        async with running(kind, policies, frozenset()) as engine:
            await engine.load(policies.snapshots[1])
            answer = asyncio.create_task(engine.sample([60], SamplingParameters(1.0, 100, 1)))
            await until_running(engine, 1)
            await engine.load(policies.snapshots[2], in_flight=False)
            assert engine.version == policies.snapshots[2].version
            after = await engine.sample([60], SamplingParameters(1.0, 5, 1))
        assert set((await answer).versions.tolist()) == {1}
        assert set(after.versions.tolist()) == {2}

    within_a_minute(run)


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_answer_stay_within_the_model(kind: EngineKind, policies: Policies):
    async def run() -> None:
        async with running(kind, policies, frozenset()) as engine:
            await engine.load(policies.snapshots[1])
            answer = await engine.sample([60] * 250, SamplingParameters(1.0, 100, 3))
            assert len(answer.tokens) <= 6
            with pytest.raises(ValueError, match="got 256 tokens, expected 1 to 255"):
                await engine.sample([60] * 256, SamplingParameters(1.0, 1))
            with pytest.raises(ValueError, match="got token ids from 60 to 320, expected 0 to 319"):
                await engine.sample([60, VOCAB_SIZE], SamplingParameters(1.0, 1))

    within_a_minute(run)


def test_transformers_keeps_nothing_of_the_file_it_loaded(policies: Policies, tmp_path: Path):
    """The next version is made of it, where it lies."""
    loaded = dataclasses.replace(policies.snapshots[1], path=tmp_path / "loaded")
    loaded.path.write_bytes(policies.snapshots[1].path.read_bytes())

    async def run() -> None:
        async with running(EngineKind.TRANSFORMERS, policies, frozenset()) as engine:
            await engine.load(loaded)
            before = await engine.sample([60, 61], SamplingParameters(0.0, 20))
            with loaded.path.open("r+b") as file:
                file.write(bytes(loaded.manifest.num_bytes))
            after = await engine.sample([60, 61], SamplingParameters(0.0, 20))
        assert before.tokens.tolist() == after.tokens.tolist()
        np.testing.assert_array_equal(before.logprobs, after.logprobs)

    within_a_minute(run)


@pytest.mark.parametrize("kind", KINDS)
def test_a_load_that_fails_keeps_the_version(kind: EngineKind, policies: Policies, tmp_path: Path):
    async def run() -> None:
        async with running(kind, policies) as engine:
            with pytest.raises(RuntimeError, match="no weights are loaded"):
                await engine.sample([60], SamplingParameters(1.0, 2))
            await engine.load(policies.snapshots[1])
            with pytest.raises(FileNotFoundError):
                await engine.load(dataclasses.replace(policies.snapshots[2], path=tmp_path / "absent"))
            assert engine.version == policies.snapshots[1].version
            assert (await engine.sample([60], SamplingParameters(1.0, 5, 1))).versions[0] == 1

    within_a_minute(run)


def test_transformers_log_probs_equal_a_full_forward(policies: Policies):
    temperatures = [0.5, 1.0, 2.0, 0.0]
    model = AutoModelForCausalLM.from_pretrained(policies.folders[1], dtype=torch.float32)

    async def run() -> None:
        async with running(EngineKind.TRANSFORMERS, policies) as engine:
            await engine.load(policies.snapshots[1])
            answers = await asyncio.gather(
                *(
                    engine.sample(prompt, SamplingParameters(temperatures[index % 4], 30, index))
                    for index, prompt in enumerate(prompts(12))
                )
            )
        for index, (prompt, answer) in enumerate(zip(prompts(12), answers, strict=True)):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer.tokens.tolist()])).logits[0, len(prompt) - 1 : -1]
            full = torch.log_softmax(logits / (temperatures[index % 4] or 1.0), dim=-1)
            expected = full.gather(1, torch.from_numpy(answer.tokens).long()[:, None])[:, 0]
            np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4)
            assert temperatures[index % 4] > 0 or torch.equal(
                full.argmax(dim=-1).int(), torch.from_numpy(answer.tokens)
            )

    within_a_minute(run)


def test_transformers_goes_on_with_old_keys_and_values_under_new_weights(policies: Policies):
    async def run() -> None:
        async with running(EngineKind.TRANSFORMERS, policies, frozenset()) as engine:
            answers, last_step = await sample_through_loads(engine, policies.snapshots)
        folders = {step: policies.folders[2 - step % 2] for step in range(1, last_step + 1)}
        for prompt, answer in zip(prompts(4), answers, strict=True):
            logits = replay(folders, prompt, answer.tokens.tolist(), answer.versions.tolist())
            drawn = torch.from_numpy(answer.tokens).long()[:, None]
            torch.testing.assert_close(logits.gather(1, drawn), logits.amax(dim=1, keepdim=True), atol=1e-4, rtol=0)
            expected = torch.log_softmax(logits, dim=-1).gather(1, drawn)[:, 0]
            np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4)

    within_a_minute(run)


@pytest.mark.parametrize("spoil", ["missing", "unknown", "misshapen"])
def test_transformers_refuses_tensors_that_are_not_the_models(spoil: str, policies: Policies, tmp_path: Path):
    tensors = load_file(policies.snapshots[2].path)
    norm = tensors.pop("model.norm.weight")
    if spoil != "missing":
        tensors |= {"model.norm.weight": norm} | ({"stray": norm.clone()} if spoil == "unknown" else {})
    if spoil == "misshapen":
        tensors["model.norm.weight"] = norm[:5].clone()
    wrong = write_snapshot(tensors, tmp_path / "wrong", run_id="test", incarnation=1, step=2, chunk_bytes=1 << 20)

    async def run() -> None:
        async with running(EngineKind.TRANSFORMERS, policies) as engine:
            await engine.load(policies.snapshots[1])
            before = await engine.sample([60], SamplingParameters(0.0, 8))
            with pytest.raises(ValueError, match=r"1 tensors do not fit .*, first (stray|model\.norm\.weight)"):
                await engine.load(wrong)
            after = await engine.sample([60], SamplingParameters(0.0, 8))
        assert engine.version == policies.snapshots[1].version
        assert before.tokens.tolist() == after.tokens.tolist()

    within_a_minute(run)


def test_closing_ends_the_answers_of_transformers(policies: Policies):
    async def run() -> None:
        async with running(EngineKind.TRANSFORMERS, policies, frozenset()) as engine:
            await engine.load(policies.snapshots[1])
            answers = [asyncio.create_task(engine.sample([60], SamplingParameters(1.0, 250))) for _ in range(80)]
            await until_running(engine, 1)
        results = await asyncio.gather(*answers, return_exceptions=True)
        assert {str(result) for result in results if isinstance(result, RuntimeError)} == {
            "transformers: the engine is closed"
        }
        with pytest.raises(RuntimeError, match="closed"):
            await engine.sample([60], SamplingParameters(1.0, 1))

    within_a_minute(run)


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_is_answered_idle_at_work_and_after_a_failed_load(kind: EngineKind, policies: Policies, tmp_path: Path):
    async def run() -> None:
        async with running(kind, policies, frozenset()) as engine:
            await engine.probe()
            await engine.load(policies.snapshots[1])
            answer = asyncio.create_task(engine.sample([60], SamplingParameters(1.0, 100, 1)))
            await until_running(engine, 1)
            with pytest.raises(FileNotFoundError):
                await engine.load(dataclasses.replace(policies.snapshots[2], path=tmp_path / "absent"))
            await engine.probe()
            await answer
            await engine.probe()
            assert engine.num_running == 0

    within_a_minute(run)


def test_a_load_that_takes_too_long_is_named(policies: Policies):
    async def run() -> None:
        actor = ACTOR.model_copy(update={"load_timeout_s": 0.2, "tokens_per_s": 0.001})
        engine = make_engine(
            EngineKind.SIMULATED, model_path=policies.folders[1], actor=actor, vocab_size=VOCAB_SIZE,
            end_tokens=frozenset(),
        )  # fmt: skip
        await engine.load(policies.snapshots[1])
        answer = asyncio.create_task(engine.sample([60], SamplingParameters(1.0, 100, 1)))
        await until_running(engine, 1)
        with pytest.raises(
            WaitTimeout, match=r"for the end of running answers \(version 2 .* from the simulated engine"
        ):
            await engine.load(policies.snapshots[2], in_flight=False)
        assert engine.version == policies.snapshots[1].version
        answer.cancel()

    within_a_minute(run)


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([2.0, -1.0, 0.5, -torch.inf, 1.0])
    uniforms = [(index + 0.5) / 1000 for index in range(1000)]
    tokens, logprobs = draw(logits.expand(1000, -1), [SamplingParameters(2.0, 1)] * 1000, uniforms)
    expected = torch.softmax(logits / 2.0, dim=0)
    torch.testing.assert_close(torch.bincount(tokens, minlength=5) / 1000, expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(logprobs, expected.log()[tokens])


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.5}, [0, 1]),
        ({"top_p": 0.75}, [0, 1, 2]),
        ({"top_p": 0.01}, [0]),
        ({"top_k": 3, "top_p": 0.7}, [0, 1]),  # of the three, the first two have 7/9
        ({"top_k": 99, "top_p": 1.0}, [0, 1, 2, 3]),
    ],
)
def test_filters_keep_the_likeliest_tokens_and_their_own_log_probs(filters: dict[str, Any], kept: list[int]):
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    order = torch.tensor([2, 0, 3, 1])  # the likeliest token is not the first
    logits, uniforms = torch.empty(4), [(index + 0.5) / 1000 for index in range(1000)]
    logits[order] = probabilities.log()
    tokens, logprobs = draw(logits.expand(1000, -1), [SamplingParameters(1.0, 1, **filters)] * 1000, uniforms)
    expected = torch.zeros(4)
    expected[order[kept]] = probabilities[kept] / probabilities[kept].sum()
    torch.testing.assert_close(torch.bincount(tokens, minlength=4) / 1000, expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(logprobs, expected.log()[tokens])


def test_each_row_of_a_batch_has_its_own_filters():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(3, -1)
    samplings = [SamplingParameters(1.0, 1), SamplingParameters(1.0, 1, top_k=1), SamplingParameters(0.0, 1, top_p=0.1)]
    tokens, logprobs = draw(logits, samplings, [0.05, 0.05, 0.05])
    assert tokens.tolist() == [0, 3, 3]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.1, 1.0, 0.4]))


def test_the_simulated_engine_keeps_its_speed(policies: Policies):
    async def measure() -> float:
        async with running(EngineKind.SIMULATED, policies) as engine:
            await engine.load(policies.snapshots[1])
            clock = asyncio.get_running_loop().time
            began = clock()
            answers = await asyncio.gather(
                *(engine.sample([60], SamplingParameters(1.0, 100, seed)) for seed in range(20))
            )
            return sum(len(answer.tokens) for answer in answers) / (clock() - began)

    speeds = [within_a_minute(measure) for _ in range(3)]  # a busy machine may slow some of them down
    assert max(speeds) == pytest.approx(ACTOR.tokens_per_s, rel=0.3)


def test_auto_says_loudly_what_it_takes(policies: Policies, caplog: pytest.LogCaptureFixture):
    engine = make_engine(
        EngineKind.AUTO, model_path=policies.folders[1], actor=ACTOR, vocab_size=VOCAB_SIZE, end_tokens=END_TOKENS
    )
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.text.rstrip().endswith(f"taking {engine.name}")


def test_choosing_an_engine_imports_none():
    heavy = "{'torch', 'transformers', 'vllm'}"
    code = f"import sys, actors.engines.choose, actors.engines.vllm; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
