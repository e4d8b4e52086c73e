"""Run by torchrun as each rank of `scale`: the same optimizer steps on however many ranks, one core each.

rank.py MODEL REPORT
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from common.config.load import resolve_config
from learner.ranks import Ranks
from learner.rows import Row, policy_row
from learner.trainer import Trainer, prepare_device
from tests.bench.cargo import GROUP_SIZE, make_group

NUM_GROUPS, PROMPT_TOKENS, ANSWER_TOKENS = 4, 64, 32
NUM_STEPS = 3
"""Timed ones; one before them is not counted."""


def step_rows() -> list[Row]:
    numbers = np.random.default_rng(5)
    advantages = [1.0, -1.0] * (GROUP_SIZE // 2)
    groups = [make_group(numbers, prompt=PROMPT_TOKENS, answers=(ANSWER_TOKENS, ANSWER_TOKENS + 1))] * NUM_GROUPS
    return [policy_row(group, advantages, temperature=1.0, aggregation="token_mean") for group in groups]


def main(model: str, report: Path) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    config = resolve_config(None, [f"model.path={model}", "algorithm.preset=grpo", "learner.num_threads=1"]).config
    device = prepare_device(config)
    torch.set_num_threads(1)
    ranks = Ranks(device, timeout_s=300)
    trainer = Trainer(config, ranks, device)
    seconds: list[float] = []
    for step in range(NUM_STEPS + 1):
        ranks.barrier()
        started = time.monotonic()
        trainer.take(step, step_rows() if ranks.is_first else None, mu=0.0)
        seconds.append(time.monotonic() - started)
    if ranks.is_first:
        report.write_text(json.dumps(seconds[1:]))
    ranks.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
