"""The formulas of deploy/README.md against what the code does."""

import numpy as np

from common.trajectory import Trajectory, TrajectoryGroup
from common.wire.groups import group_frames
from tests.deploy.tools import ROOT

README = (ROOT / "deploy" / "README.md").read_text()


def test_a_group_has_as_many_bytes_as_the_formula_says() -> None:
    num_answers, num_tokens = 8, 60
    tokens, floats = np.zeros(num_tokens, dtype=np.int32), np.zeros(num_tokens, dtype=np.float32)
    answer = Trajectory(tokens, floats, floats, tokens, 0.0, False)
    group = TrajectoryGroup("lease", 10, (answer,) * num_answers, 1.0)
    assert sum(len(bytes(frame)) for frame in group_frames(group)) == 16 * num_answers * num_tokens
    assert "| a group, on the wire | 16 · K · L bytes;" in README
