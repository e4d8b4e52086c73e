"""Ranks that wait for one another: two processes, a real process group."""

import os
import subprocess
import sys

from common.wire.ports import free_ports
from tests.runs import PATIENCE_S, QUIET

LIMIT_S, WAIT_S = 6.0, 9.0
RANK = f"""
import sys, time
import torch
from learner.ranks import Ranks
ranks = Ranks(torch.device("cpu"), timeout_s={LIMIT_S})
if ranks.is_first:
    deadline = time.monotonic() + {WAIT_S}
    while time.monotonic() < deadline:
        ranks.say_not_yet()
        time.sleep(0.2)
print(ranks.share_number(0.25 if ranks.is_first else None))
ranks.close()
"""


def test_ranks_wait_for_the_first_longer_than_their_limit_where_it_says_not_yet() -> None:
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
            assert said.split() == ["0.25"], error
    finally:
        for rank in ranks:
            rank.kill()
