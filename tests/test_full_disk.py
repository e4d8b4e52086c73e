"""A full disk ends the learner with one line, and what was finished before it stays good."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from learner.checkpoints import Checkpoints
from tests.runs import import_experts, run_module, write_config


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small disk cannot be mounted here: only root may, and not in every container")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_named_in_one_line(tiny_model: Path, tmp_path: Path, small_disk: Path) -> None:
    config = write_config(
        tmp_path,
        tiny_model,
        run={"dir": str(small_disk / "run")},
        algorithm={"preset": "sft"},
        eval={"every_steps": 0},
        learner={"num_steps": 8, "checkpoint_every_steps": 1, "keep_checkpoints": 4},
    )
    import_experts(config)
    done = run_module("learner", "--config", str(config), check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    last = done.stderr.splitlines()[-1]
    assert last.startswith("chord-learner: "), last
    assert "full" in last
    kept = Checkpoints(small_disk / "run" / "checkpoints", keep=4)
    assert kept.newest_good() is not None
