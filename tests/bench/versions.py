"""The versions of a real training run: SmolLM2-135M learns sums from demonstrations, float32 inside, bfloat16 outside.

`python -m tests.bench.versions LR NUM_STEPS FOLDER` makes them in a process of its own, as the learner's engine lives
once in a process.
The first steps of AdamW are the largest: its moments have not averaged anything out yet, so that every weight moves by
about the learning rate. Later versions differ less.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
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


def train_versions(lr: float, *, num_steps: int, folder: Path) -> Versions:
    """They pass through `folder`, where nothing of them stays."""
    command = [sys.executable, "-m", "tests.bench.versions", str(lr), str(num_steps), str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
    paths = [folder / f"{step}.trained" for step in range(num_steps + 1)]
    tensors = [{name: tensor.clone() for name, tensor in load_file(path).items()} for path in paths]
    for path in paths:
        path.unlink()
    return Versions(lr, tensors, json.loads(done.stdout.splitlines()[-1]))


def train(lr: float, num_steps: int, folder: Path) -> list[float]:
    """Write each version; returns what each took on the train thread."""
    overrides = [f"learner.lr={lr}", 'learner.lr_schedule="constant"', "learner.lr_warmup_steps=0"]
    config = resolve_config(RECIPE, [f"model.path={MODEL}", *overrides]).config
    device = prepare_device(config)
    ranks = Ranks(device)
    trainer = Trainer(config, ranks, device)
    rows = demonstrations(Chat(MODEL), num_steps * ROWS_PER_STEP)
    copy_s = list[float]()
    save_file(trainer.published_tensors(), folder / "0.trained")
    for step in range(num_steps):
        trainer.take(step, rows[step * ROWS_PER_STEP : (step + 1) * ROWS_PER_STEP], mu=1.0)
        started = time.perf_counter()
        tensors = trainer.published_tensors()
        copy_s.append(time.perf_counter() - started)
        save_file(tensors, folder / f"{step + 1}.trained")
    ranks.close()
    return copy_s


def demonstrations(chat: Chat, count: int) -> list[Row]:
    problems = ReasoningProblems(family="chain_sum", seed=7, min_terms=2, max_terms=4, min_digits=1, max_digits=3)
    rows: list[Row] = []
    for index in range(count):
        problem = problems.problem("train", index)
        answer = ChatMessage(role="assistant", content=problem.answer)
        rows.append(expert_row(chat.demonstration([*problem.messages, answer]), aggregation="token_mean"))
    return rows


if __name__ == "__main__":
    print(json.dumps(train(float(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
