"""The policy half is alive: without expert rows the reward rises, but not with advantages of the wrong sign."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry

from actors.engines.transformers import TransformersEngine
from actors.environment import SingleTurn
from actors.guard import EngineGuard
from actors.rollout import Rollout
from common.chat import Chat, ChatMessage
from common.config.schema import Actor
from common.problems import Split
from common.trajectory import TrajectoryGroup
from common.weights.snapshot import write_snapshot
from common.wire.messages import Lease
from learner.batch import build_batch
from learner.objective.importance import Correction
from learner.policy_model import load_policy_model
from learner.ranks import Ranks
from learner.rows import Row, micro_batches, policy_row
from learner.shaping import Shaping
from learner.shards import Sharding
from learner.train_engine import Objective, OptimizerSettings, TrainEngine

NUM_STEPS, NUM_GROUPS, GROUP_SIZE = 15, 8, 8
SHAPING = Shaping(scale="std", overlong="keep", max_tokens=8, buffer_tokens=0)
RISE = 0.15


class Digits(SingleTurn[int]):
    """Write digits: the reward is their share of the answer."""

    def task(self, split: Split, index: int) -> tuple[int, Sequence[ChatMessage]]:
        return index, [ChatMessage(role="user", content=f"Digits, please ({index % 7}).")]

    def score(self, task: int, text: str) -> float:
        return sum(character.isdigit() for character in text) / max(len(text), 1)


async def train(model_path: Path, folder: Path, *, sign: float) -> list[float]:
    """Mean reward of each step of synchronous GRPO, the advantages times `sign`."""
    chat = Chat(model_path)
    actor = Actor(dtype="float32", max_model_tokens=128)
    engine = TransformersEngine(model_path, actor=actor, vocab_size=chat.vocab_size, end_tokens=chat.end_tokens)
    rollout = Rollout(EngineGuard(engine, actor, CollectorRegistry()), Digits(), chat, actor)
    model = load_policy_model(model_path, dtype=torch.float32, head_chunk_tokens=512)
    objective = Objective(Correction(kind="tis"), "none")
    learner = TrainEngine(
        model,
        Ranks(torch.device("cpu")),
        torch.device("cpu"),
        objective,
        OptimizerSettings(0.0, (0.9, 0.999), 1.0, Sharding()),
    )
    rewards: list[float] = []
    await engine.start()
    try:
        for step in range(NUM_STEPS):
            path = folder / f"{step}.safetensors"
            await engine.load(write_snapshot(
                learner.tensors(torch.float32), path, run_id="rl", incarnation=1, step=step, chunk_bytes=1 << 20
            ))  # fmt: skip
            groups = [await rollout.group(lease_of(step * NUM_GROUPS + number)) for number in range(NUM_GROUPS)]
            rewards.append(sum(t.reward for g in groups for t in g.trajectories) / (NUM_GROUPS * GROUP_SIZE))
            rows = [signed_row(group, sign) for group in groups]
            learner.step([build_batch(some) for some in micro_batches(rows, 4096)], mu=0.0, lr=3e-3)
    finally:
        await engine.close()
    return rewards


def lease_of(number: int) -> Lease:
    return Lease(
        lease_id=str(number),
        prompt_index=number,
        group_size=GROUP_SIZE,
        temperature=1.0,
        max_tokens=8,
        seed=number * GROUP_SIZE,
    )


def signed_row(group: TrajectoryGroup, sign: float) -> Row:
    row = policy_row(group, SHAPING.advantages(group).tolist(), temperature=1.0, aggregation="token_mean")
    return replace(row, branches=tuple(replace(branch, advantage=sign * branch.advantage) for branch in row.branches))


def rise(rewards: list[float]) -> float:
    return sum(rewards[-3:]) / 3 - sum(rewards[:3]) / 3


def test_grpo_alone_raises_the_reward(tiny_model: Path, tmp_path: Path) -> None:
    rewards = asyncio.run(train(tiny_model, tmp_path, sign=1.0))
    assert rise(rewards) > RISE, rewards


def test_with_the_sign_of_the_advantages_flipped_the_reward_does_not_rise(tiny_model: Path, tmp_path: Path) -> None:
    rewards = asyncio.run(train(tiny_model, tmp_path, sign=-1.0))
    with pytest.raises(AssertionError):
        assert rise(rewards) > RISE, rewards
