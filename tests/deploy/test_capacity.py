"""The formulas of deploy/README.md against what the code does."""

import numpy as np

from common.trajectory import NOT_SAMPLED, Trajectory, TrajectoryGroup
from common.wire.groups import group_frames
from tests.deploy.tools import ROOT

README = (ROOT / "deploy" / "README.md").read_text()


def test_a_group_has_as_many_bytes_as_the_formula_says() -> None:
    num_answers, num_prompt, num_tokens = 8, 10, 50
    sampled = np.arange(num_prompt + num_tokens) >= num_prompt
    versions = np.where(sampled, 3, NOT_SAMPLED).astype(np.int32)
    plain, half = sampled.astype(np.float32), 0.5 * sampled.astype(np.float32)
    tokens, logprobs = np.zeros(len(sampled), dtype=np.int32), np.zeros(len(sampled), dtype=np.float32)

    def num_bytes(mask: "np.ndarray[tuple[int], np.dtype[np.float32]]") -> int:
        answer = Trajectory(tokens, logprobs, mask, versions, 0.0, is_truncated=False)
        group = TrajectoryGroup("lease", num_prompt, (answer,) * num_answers, 1.0)
        return sum(len(frame) for frame in group_frames(group))

    run = 8
    assert num_bytes(plain) == 8 * num_answers * num_tokens + 4 * num_prompt + run
    assert num_bytes(half) == num_bytes(plain) + 4 * num_answers * num_tokens
    assert "| 8 · K · A + 4 · Q bytes (4 · K · A more where a mask is not plain);" in README
