"""The formulas of deploy/README.md against what the code does."""

import numpy as np
import pytest

from common.trajectory import NOT_SAMPLED, Trajectory, TrajectoryGroup
from common.wire.codec import encode
from common.wire.groups import group_frames, group_header
from tests.deploy.tools import ROOT

README = (ROOT / "deploy" / "README.md").read_text()


def test_a_group_has_as_many_bytes_as_the_formula_says() -> None:
    num_answers, num_prompt, num_tokens = 8, 10, 50
    sampled = np.arange(num_prompt + num_tokens) >= num_prompt
    versions = np.where(sampled, 3, NOT_SAMPLED).astype(np.int32)
    plain, half = sampled.astype(np.float32), 0.5 * sampled.astype(np.float32)
    tokens, logprobs = np.zeros(len(sampled), dtype=np.int32), np.zeros(len(sampled), dtype=np.float32)

    def make_group(mask: "np.ndarray[tuple[int], np.dtype[np.float32]]") -> TrajectoryGroup:
        answer = Trajectory(tokens, logprobs, mask, versions, 0.25, is_truncated=False)
        return TrajectoryGroup("123.0123456789ab", num_prompt, (answer,) * num_answers, 1.234)

    def num_bytes(mask: "np.ndarray[tuple[int], np.dtype[np.float32]]") -> int:
        return sum(len(frame) for frame in group_frames(make_group(mask)))

    run = 8
    assert num_bytes(plain) == 8 * num_answers * num_tokens + 4 * num_prompt + run
    assert num_bytes(half) == num_bytes(plain) + 4 * num_answers * num_tokens
    header, *_ = encode(group_header(make_group(plain), run_id="0123456789ab", incarnation=1, request_id=12345))
    assert len(header) == pytest.approx(60 * num_answers, rel=0.1)
    formula = "| 8 · K · A + 4 · Q bytes (4 · K · A more where a mask is not plain), and a header of about 60 · K;"
    assert formula in README
