"""The versions of a real training run: SmolLM2-135M learns sums from demonstrations, float32 inside, bfloat16 outside.

The first steps of AdamW are the largest: its moments have not averaged anything out yet, so that every weight moves by
about the learning rate. Later versions differ less.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from common.chat import Chat, ChatMessage
from common.config.load import resolve_config
from common.problems import ReasoningProblems
from learner.ranks import Ranks
from learner.rows import Row, expert_row
from learner.trainer import Trainer, prepare_device

MODEL = Path("models/smollm2-135m")
RECIPE = Path("deploy/recipes/demo.toml")
ROWS_PER_STEP = 24


@dataclass(frozen=True)
class Versions:
    """What the learner publishes before the first step and after each."""

    lr: float
    tensors: list[dict[str, Tensor]]
    copy_s: list[float]
    """What each version took on the train thread: its parameters in the precision that is published."""


def train_versions(lr: float, *, num_steps: int) -> Versions:
    overrides = [f"learner.lr={lr}", 'learner.lr_schedule="constant"', "learner.lr_warmup_steps=0"]
    config = resolve_config(RECIPE, [f"model.path={MODEL}", *overrides]).config
    device = prepare_device(config)
    ranks = Ranks(device)
    trainer = Trainer(config, ranks, device)
    rows = demonstrations(Chat(MODEL), num_steps * ROWS_PER_STEP)
    tensors, copy_s = [trainer.published_tensors()], list[float]()
    for step in range(num_steps):
        trainer.take(step, rows[step * ROWS_PER_STEP : (step + 1) * ROWS_PER_STEP], mu=1.0)
        started = time.perf_counter()
        tensors.append(trainer.published_tensors())
        copy_s.append(time.perf_counter() - started)
    ranks.close()
    return Versions(lr, tensors, copy_s)


def demonstrations(chat: Chat, count: int) -> list[Row]:
    problems = ReasoningProblems(family="chain_sum", seed=7, min_terms=2, max_terms=4, min_digits=1, max_digits=3)
    rows: list[Row] = []
    for index in range(count):
        problem = problems.problem("train", index)
        answer = ChatMessage(role="assistant", content=problem.answer)
        rows.append(expert_row(chat.demonstration([*problem.messages, answer]), aggregation="token_mean"))
    return rows
