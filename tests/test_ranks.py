"""Ranks that wait for one another: two processes, a real process group."""

import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import torch

import learner.ranks
from common.wire.ports import free_ports
from learner.batch import build_batch
from tests.runs import PATIENCE_S, QUIET
from tests.steps import some_rows

NUM_TIMES = 5
RANK = f"""
import torch
import learner.ranks
learner.ranks.NOT_YET_S = 0.0
ranks, met = learner.ranks.Ranks(torch.device("cpu")), []
ranks.on_meeting = lambda: met.append(1)
if ranks.is_first:
    for _ in range({NUM_TIMES}):
        ranks.say_not_yet()
print(ranks.share_number(0.25 if ranks.is_first else None), len(met))
ranks.close()
"""


def test_each_not_yet_of_the_first_is_a_meeting_after_which_the_others_wait_anew() -> None:
    """Their limit is that of one meeting."""
    (port,) = free_ports(1, "127.0.0.1")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={
                **os.environ, **QUIET, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for rank in ranks:
            said, error = rank.communicate(timeout=PATIENCE_S)
            assert said.split() == ["0.25", str(NUM_TIMES + 1)], error
    finally:
        for rank in ranks:
            rank.kill()


def test_a_batch_reaches_another_rank_as_it_was_built() -> None:
    internals: Any = learner.ranks
    batches = [build_batch(some_rows()), build_batch([])]
    arrived = internals._from_bytes(internals._to_bytes(batches))
    assert [type(batch.longest_sequence) for batch in arrived] == [int, int]
    for ours, theirs in zip(batches, arrived, strict=True):
        torch.testing.assert_close(asdict(theirs), asdict(ours), rtol=0, atol=0, equal_nan=True)
