"""What a step is made of, from engine, ledger and store to the loss: temperatures, μ, and neither half ever missing."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry
from tiny_model import reconfigure, snapshot_of
from transformers import BloomConfig, Gemma3TextConfig, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from actors.engines.transformers import TransformersEngine
from actors.environment import Turn
from actors.guard import EngineGuard
from actors.rollout import Rollout
from common.chat import Chat, ChatMessage
from common.config.load import resolve_config
from common.config.schema import Actor, Config
from common.errors import ConfigError, OperatorError, WaitTimeout
from common.problems import Split
from common.trajectory import TrajectoryGroup
from common.wire.codec import encode
from common.wire.groups import from_blob, group_frames, group_header, to_blob
from common.wire.messages import Lease
from learner.batch import build_batch
from learner.context import Context
from learner.expert.store import ExpertStore, NewRow
from learner.ledger.ledger import Ledger, Sample
from learner.objective.importance import Correction
from learner.policy_model import PolicyModel, load_policy_model
from learner.ranks import Ranks
from learner.rows import Aggregation, Row, policy_row
from learner.source import Source
from learner.step_rows import StepReader, StepRows, open_experts
from learner.trainer import Trainer
from tests import reference
from tests.judge import Judge
from tests.steps import CPU

TEMPERATURE = 0.7
NUM_EXPERTS = 3
SAMPLE = Sample(0, 3, 30, 1.5, 0.25)


class Talk:
    """Two questions, whatever is answered to the first: an answer, a reply that bears no loss, and an answer."""

    full_reward = 1.0
    category = ""

    def episode(self, split: Split, index: int) -> "Talk":
        self = Talk()
        self.has_replied, self.index = False, index
        return self

    async def begin(self) -> Sequence[ChatMessage]:
        return [ChatMessage(role="user", content=f"Say {self.index}.")]

    async def answer(self, text: str, *, is_truncated: bool) -> Turn:
        messages = () if self.has_replied else (ChatMessage(role="user", content="And now?"),)
        self.has_replied = True
        return Turn(float(len(text)), messages)


@pytest.fixture(scope="module")
def group(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TrajectoryGroup:
    """A real engine's answers at TEMPERATURE, over the wire and back."""
    folder = tmp_path_factory.mktemp("snapshot")
    chat = Chat(tiny_model)
    actor = Actor(dtype="float32", max_model_tokens=256)
    ends = chat.end_tokens | frozenset(range(0, chat.vocab_size, 4))

    async def sample() -> TrajectoryGroup:
        engine = TransformersEngine(tiny_model, actor=actor, vocab_size=chat.vocab_size, end_tokens=ends)
        rollout = Rollout(EngineGuard(engine, actor, CollectorRegistry()), Talk(), chat, actor)
        await engine.start()
        try:
            await engine.load(snapshot_of(tiny_model, folder / "0.safetensors", step=0))
            lease = Lease(
                lease_id="1", prompt_index=3, group_size=6, temperature=TEMPERATURE, max_tokens=24, seed=5
            )  # fmt: skip
            return await rollout.group(lease)
        finally:
            await engine.close()

    sampled = asyncio.run(asyncio.wait_for(sample(), 60))
    return from_blob(blob_of(sampled))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PolicyModel:
    return load_policy_model(tiny_model, dtype=torch.float32, head_chunk_tokens=64)


def blob_of(group: TrajectoryGroup) -> bytes:
    return to_blob(encode(group_header(group), group_frames(group)))


def row_of(group: TrajectoryGroup, temperature: float) -> Row:
    return policy_row(group, [1.0] * len(group.trajectories), temperature=temperature, aggregation="token_mean")


def largest_difference(model: PolicyModel, row: Row) -> float:
    """Between the learner's log-probs and the behaviour log-probs, over the row's loss-bearing tokens."""
    batch = build_batch([row])
    with torch.no_grad():
        logprobs, _ = model(batch)
    return float((logprobs - batch.behavior_logprobs)[batch.mask > 0].abs().max())


def test_behaviour_log_probs_are_the_learners_own_at_the_sampling_temperature(
    group: TrajectoryGroup, model: PolicyModel
) -> None:
    at_temperature = row_of(group, TEMPERATURE)
    assert any((b.mask[:-1] == 0).any() for b in at_temperature.branches), "expected replies between answers"
    assert largest_difference(model, at_temperature) < 1e-4
    assert largest_difference(model, row_of(group, 1.0)) > 0.1


@dataclass
class Bench:
    """A source with its ledger, its store of NUM_EXPERTS demonstrations and its chat."""

    config: Config
    ledger: Ledger
    experts: ExpertStore | None
    source: Source
    chat: Chat

    def resumed(self) -> "Bench":
        """What a new process would make of the same ledger and store."""
        return bench_of(self.config, self.ledger, self.experts, self.chat)

    def deliver(self, group: TrajectoryGroup, count: int, sample: Sample = SAMPLE) -> None:
        """`count` copies of `group`, as many actors would send them; the ledger notes `sample` of each."""
        for number in range(count):
            (granted,) = self.ledger.lease(f"a{number}", f"s{number}", capacity=1, serving_step=0, held=())
            self.ledger.commit(granted.lease_id, blob_of(group), sample)


def bench_of(config: Config, ledger: Ledger, experts: ExpertStore | None, chat: Chat) -> Bench:
    reader = StepReader(config, ledger.history, experts, chat)
    source = Source(config, ledger, experts, reader, describe_peers=lambda: "nobody", check=lambda: None)
    return Bench(config, ledger, experts, source, chat)


@pytest.fixture
def bench(tiny_model: Path, tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """Sources of runs whose configuration is overridden."""
    with ExitStack() as stack:

        def make(*overrides: str) -> Bench:
            config = config_of(tiny_model, tmp_path, *overrides)
            with_rows = ExpertStore(tmp_path / "expert.sqlite", create=True)
            with_rows.add(demonstrations())
            with_rows.close()
            chat = Chat(tiny_model)
            experts = open_experts(config, chat)
            ledger = Ledger(tmp_path / "ledger.sqlite", groups_per_step=2, max_staleness=config.algorithm.max_staleness)
            stack.callback(ledger.close)
            if experts:
                stack.callback(experts.close)
            return bench_of(config, ledger, experts, chat)

        yield make


def config_of(model: Path, folder: Path, *overrides: str) -> Config:
    own = [
        f"run.dir={folder}", f"model.path={model}", f"sampling.temperature={TEMPERATURE}", "learner.groups_per_step=2",
        f"expert.path={folder / 'expert.sqlite'}", "expert.rows_per_step=2", "learner.start_timeout_s=0.3",
        "learner.group_timeout_s=0.3",
        "actor.answer_timeout_s=0.2", "algorithm.preset=chord_phi", "algorithm.group_size=6",
        "learner.head_chunk_tokens=64",
    ]  # fmt: skip
    return resolve_config(None, [*own, *overrides]).config


def demonstrations() -> list[NewRow]:
    def turns(number: int) -> tuple[ChatMessage, ...]:
        question = ChatMessage(role="user", content=f"Count to {number}.")
        return question, ChatMessage(role="assistant", content=" ".join(map(str, range(number + 1))))

    return [NewRow(turns(number), "test") for number in range(NUM_EXPERTS)]


def test_policy_rows_have_the_sampling_temperature_and_expert_rows_have_1(
    bench: Callable[..., Bench], group: TrajectoryGroup, tiny_model: Path, tmp_path: Path
) -> None:
    made = bench()
    made.deliver(group, 2)
    drawn = made.source.next_rows(0)
    rows = drawn.rows
    found = {(branch.is_expert, branch.temperature) for row in rows for branch in row.branches}
    assert found == {(False, TEMPERATURE), (True, 1.0)}
    report = Trainer(made.config, Ranks(CPU), CPU).take(0, rows, mu=drawn.mu).report
    assert report.metrics["policy_ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert report.metrics["policy_mismatch_kl"] == pytest.approx(0.0, abs=1e-6)
    verdict = Judge(tiny_model).step(rows, correction=Correction(), weighting="phi", mu=0.1)
    assert report.metrics["expert_nll_mean"] == pytest.approx(verdict.metrics["expert_nll_mean"], rel=1e-4)
    assert report.metrics["policy_entropy"] == pytest.approx(verdict.metrics["policy_entropy"], rel=1e-4)
    assert report.metrics["grad_norm"] == pytest.approx(
        float(torch.stack([entry.square().sum() for entry in verdict.gradient.values()]).sum().sqrt()), rel=1e-3
    )


def test_advantages_come_from_the_rewards_of_one_group_and_of_no_expert_row(
    bench: Callable[..., Bench], group: TrajectoryGroup
) -> None:
    made = bench()
    made.deliver(group, 2)
    expected = reference.advantages(np.array([t.reward for t in group.trajectories]), "std", 1e-6)
    for row in made.source.next_rows(0).rows:
        found = [branch.advantage for branch in row.branches]
        np.testing.assert_allclose(found, [np.nan] if row.branches[0].is_expert else expected, rtol=1e-5)


@pytest.mark.parametrize("num_groups", [0, 1])
def test_a_starved_queue_makes_no_step_at_all(
    bench: Callable[..., Bench], group: TrajectoryGroup, num_groups: int
) -> None:
    made = bench()
    made.deliver(group, num_groups)
    with pytest.raises(WaitTimeout, match=f"{2 - num_groups} of 2 groups of step 1"):
        made.source.next_rows(0)
    assert made.ledger.history.batch(0) is None


def test_a_store_smaller_than_a_step_is_gone_through_again_and_again(
    bench: Callable[..., Bench], group: TrajectoryGroup
) -> None:
    made = bench("expert.rows_per_step=8")
    made.deliver(group, 2)
    drawn = made.source.next_rows(0)
    assert len(drawn.composition.expert_row_ids) == len(expert_rows(drawn)) == 8
    uses = [drawn.composition.expert_row_ids.count(row_id) for row_id in range(1, NUM_EXPERTS + 1)]
    assert sorted(uses) == [2, 3, 3]


@pytest.mark.parametrize("reward", [0.15, 0.75])
def test_mu_follows_the_mean_reward_of_the_steps_own_groups_where_a_target_is_given(
    bench: Callable[..., Bench], group: TrajectoryGroup, reward: float
) -> None:
    made = bench("algorithm.mu_target=0.4")
    made.deliver(group, 1, Sample(0, 4, 30, reward_sum=4 * (reward - 0.1), sampling_s=0.25))
    made.deliver(group, 1, Sample(0, 4, 30, reward_sum=4 * (reward + 0.1), sampling_s=0.25))
    drawn = made.source.next_rows(0)
    assert drawn.mu == pytest.approx({0.15: 0.25, 0.75: 0.0}[reward])
    assert len(expert_rows(drawn)) == (2 if drawn.mu else 0)


def test_answers_cut_off_stay_in_the_denominator_when_they_are_masked(
    bench: Callable[..., Bench], group: TrajectoryGroup
) -> None:
    first, *others = group.trajectories
    cut_off = replace(group, trajectories=(replace(first, is_truncated=True), *others))
    made = bench("algorithm.overlong=mask")
    made.deliver(cut_off, 2)
    drawn = made.source.next_rows(0)
    report = Trainer(made.config, Ranks(CPU), CPU).take(0, drawn.rows, mu=drawn.mu).report
    assert report.num_policy_tokens == 2 * sum(t.num_answer_tokens for t in group.trajectories)
    expected = reference.advantages(np.array([t.reward for t in group.trajectories]), "std", 1e-6)
    for row in drawn.rows[:2]:
        np.testing.assert_allclose([branch.advantage for branch in row.branches], [0.0, *expected[1:]], rtol=1e-5)


@pytest.mark.parametrize("half", ["policy", "expert"])
def test_a_half_that_has_weight_and_nothing_to_learn_from_ends_the_run(
    bench: Callable[..., Bench], group: TrajectoryGroup, half: str
) -> None:
    """The last guard: whatever made such a composition, no step is silently another method's."""
    made = bench()
    made.deliver(group, 2)
    whole = made.source.next_rows(0).composition
    wrong = replace(whole, **{"policy": {"group_ids": ()}, "expert": {"expert_row_ids": ()}}[half])
    reader = StepReader(made.config, made.ledger.history, made.experts, made.chat)
    assert reader.read(whole).mu == pytest.approx(0.1)
    with pytest.raises(OperatorError, match=f"step 0: got μ 0.1 and nothing for the {half} half, expected rows"):
        reader.read(wrong)


def expert_rows(drawn: StepRows) -> list[Row]:
    return [row for row in drawn.rows if row.branches[0].is_expert]


def test_every_step_of_an_exhausted_store_has_its_expert_rows(
    bench: Callable[..., Bench], group: TrajectoryGroup
) -> None:
    made = bench("algorithm.max_staleness=4")
    used: list[int] = []
    for step in range(3):
        made.deliver(group, 2)
        drawn = made.source.next_rows(step)
        made.ledger.finish_batch(step, "{}")
        assert (len(expert_rows(drawn)), len(drawn.groups)) == (2, 2), step
        used += drawn.composition.expert_row_ids
    assert sorted(used) == [1, 1, 2, 2, 3, 3], "expected every row once before any comes again"


def test_a_store_without_a_row_is_refused_before_anything_is_trained(tiny_model: Path, tmp_path: Path) -> None:
    config = config_of(tiny_model, tmp_path)
    ExpertStore(tmp_path / "expert.sqlite", create=True).close()
    with pytest.raises(OperatorError, match="holds no rows, expected at least one"):
        open_experts(config, Chat(tiny_model))


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"max_position_embeddings": 50}, "max_position_embeddings"),
        ({"model_type": "mistral", "sliding_window": 50}, "sliding_window"),
    ],
)
def test_a_demonstration_that_the_model_cannot_attend_to_is_refused_before_anything_is_trained(
    keys: dict[str, Any], key: str, tiny_model: Path, tmp_path: Path
) -> None:
    def open_with(answer: str) -> None:
        folder = tmp_path / str(len(answer))
        folder.mkdir()
        question = ChatMessage(role="user", content="Count.")
        store = ExpertStore(folder / "expert.sqlite", create=True)
        store.add([NewRow((question, ChatMessage(role="assistant", content=text)), "test") for text in ("1", answer)])
        store.close()
        opened = open_experts(config_of(model, folder), chat)
        assert opened
        opened.close()

    model = reconfigure(tiny_model, tmp_path / "model", **keys)
    chat = Chat(model)
    room = 50 - len(chat.prompt_tokens([ChatMessage(role="user", content="Count.")])) - 1
    open_with("1" * room)
    with pytest.raises(OperatorError) as refused:
        open_with("1" * (room + 1))
    store = tmp_path / str(room + 1) / "expert.sqlite"
    said = f"expert.path: {store}: row 2: got 51 tokens, expected at most 50 ({key} of {model})"
    assert str(refused.value) == said


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (LlamaConfig(max_position_embeddings=512), Context(512, None)),
        (LlamaConfig(max_position_embeddings=512, sliding_window=64), Context(512, None)),
        (MistralConfig(max_position_embeddings=512, sliding_window=64), Context(512, 64)),
        (MistralConfig(max_position_embeddings=512, sliding_window=None), Context(512, None)),
        (
            Qwen2Config(max_position_embeddings=512, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
            Context(None, None),
        ),
        (Gemma3TextConfig(max_position_embeddings=512, sliding_window=64), Context(512, 64)),
        (Qwen2Config(max_position_embeddings=512, sliding_window=64), Context(512, None)),
        (
            Qwen2Config(max_position_embeddings=512, sliding_window=64, use_sliding_window=True, max_window_layers=9),
            Context(512, 64),
        ),
        (
            Qwen2Config(max_position_embeddings=512, sliding_window=64, use_sliding_window=True, max_window_layers=32),
            Context(512, None),
        ),
        (BloomConfig(), Context(None, None)),
    ],
)
def test_a_window_counts_where_a_layer_uses_it(known: PreTrainedConfig, expected: Context, tmp_path: Path) -> None:
    known.save_pretrained(tmp_path)
    assert Context.of(tmp_path) == expected


def test_answers_longer_than_the_learners_window_are_refused_where_the_run_trains_on_any(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = config_of(tiny_model, tmp_path, "actor.max_model_tokens=1025")
    for harmless in (Context(512, None), Context(None, 1025), Context(512, 2048)):
        harmless.check_answers(config)
    with pytest.raises(
        OperatorError, match=r"actor\.max_model_tokens: got 1025, expected at most 1024 \(sliding_window"
    ):
        Context(4096, 1024).check_answers(config)
    sft = config_of(tiny_model, tmp_path, "algorithm.preset=sft", "actor.max_model_tokens=1025")
    Context(4096, 1024).check_answers(sft)


SCHEDULE = [
    "algorithm.preset=chord_mu", "algorithm.mu_peak=0.8", "algorithm.mu_valley=0.1", "algorithm.mu_warmup_steps=2",
    "algorithm.mu_decay_steps=4", "learner.micro_batch_tokens=300", "learner.num_steps=20", "algorithm.max_staleness=9",
]  # fmt: skip


def test_mu_follows_the_learners_step_counted_from_0_and_goes_on_after_a_resume(
    bench: Callable[..., Bench], group: TrajectoryGroup, tmp_path: Path
) -> None:
    made = bench(*SCHEDULE)
    trainer = Trainer(made.config, Ranks(CPU), CPU)
    for step in range(8):
        if step == 3:
            trainer.save(tmp_path / "saved")
            trainer = Trainer(made.config, Ranks(CPU), CPU)
            trainer.restore(tmp_path / "saved")
            made = made.resumed()
        made.deliver(group, 2)
        drawn = made.source.next_rows(step)
        report = trainer.take(step, drawn.rows, mu=drawn.mu).report
        made.ledger.finish_batch(step, "{}")
        mu = reference.mu(step, 0.8, 0.1, 2, 4)
        policy, expert = report.metrics["policy_loss"], report.metrics["expert_loss"]
        assert drawn.mu == pytest.approx(mu), step
        assert report.metrics["loss"] == pytest.approx((1 - mu) * policy + mu * expert, abs=1e-6), step
        assert mu == 0 or abs(policy - expert) > 0.01, "expected halves that tell μ"
        assert report.num_policy_tokens == 2 * sum(t.num_answer_tokens for t in group.trajectories)
        assert report.num_expert_tokens == sum(row.branches[0].mask.sum() for row in expert_rows(drawn))


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_masks_carry_the_aggregation_in_both_halves(
    aggregation: str, bench: Callable[..., Bench], group: TrajectoryGroup
) -> None:
    made = bench(f"algorithm.aggregation={aggregation}")
    made.deliver(group, 2)
    branches = [branch for row in made.source.next_rows(0).rows for branch in row.branches]
    for branch in branches:
        expected = reference.loss_weights((branch.mask > 0).astype(np.float64), aggregation)
        np.testing.assert_allclose(branch.mask, expected, rtol=1e-6)
    assert {branch.is_expert for branch in branches} == {True, False}


@pytest.mark.parametrize("override", ["sampling.top_p=0.9", "sampling.top_k=20"])
def test_filtered_sampling_is_refused_in_training(override: str, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the learner cannot match"):
        config_of(tiny_model, tmp_path, override)
