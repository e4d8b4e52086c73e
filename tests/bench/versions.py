"""The versions of a real training run: SmolLM2-135M learns sums from demonstrations, float32 inside, bfloat16 outside.

The first steps of AdamW are the largest: its moments have not averaged anything out yet, so that every weight moves by
about the learning rate. Later versions differ less.
"""

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


def train_versions(lr: float, *, num_steps: int) -> list[dict[str, Tensor]]:
    """What the learner publishes before the first step and after each."""
    overrides = [f"learner.lr={lr}", 'learner.lr_schedule="constant"', "learner.lr_warmup_steps=0"]
    config = resolve_config(RECIPE, [f"model.path={MODEL}", *overrides]).config
    device = prepare_device(config)
    ranks = Ranks(device)
    trainer = Trainer(config, ranks, device)
    rows = demonstrations(Chat(MODEL), num_steps * ROWS_PER_STEP)
    versions = [trainer.published_tensors()]
    for step in range(num_steps):
        trainer.take(step, rows[step * ROWS_PER_STEP : (step + 1) * ROWS_PER_STEP], mu=1.0)
        versions.append(trainer.published_tensors())
    ranks.close()
    return versions


def demonstrations(chat: Chat, count: int) -> list[Row]:
    problems = ReasoningProblems(family="chain_sum", seed=7, min_terms=2, max_terms=4, min_digits=1, max_digits=3)
    rows: list[Row] = []
    for index in range(count):
        problem = problems.problem("train", index)
        answer = ChatMessage(role="assistant", content=problem.answer)
        rows.append(expert_row(chat.demonstration([*problem.messages, answer]), aggregation="token_mean"))
    return rows
