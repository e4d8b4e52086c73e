"""A run directory of another user: told in one line, and left as it was."""

import fcntl
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import learner.rewind  # noqa: F401 - before the test gives up its rights
from common.errors import OperatorError
from common.run_dir import RunDir
from learner.__main__ import learner as start
from tests.runs import QUIET, write_config

STRANGER = 54321
"""A user without a name."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a folder away")


@pytest.fixture
def config(tiny_model: Path) -> Iterator[Path]:
    """Of a run that the stranger has begun, in a folder that everybody may enter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        path = write_config(folder, tiny_model)
        path.chmod(0o644)
        (folder / "run" / "logs").mkdir(parents=True)
        (folder / "run" / "ledger.sqlite").touch()
        for place in (folder / "run", *(folder / "run").iterdir()):
            os.chown(place, STRANGER, STRANGER)
        yield path


def run_learner(config: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "learner", "--config", str(config), *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **QUIET}, check=False
    )


@pytest.mark.parametrize("words", [[], ["--rewind", "0"]])
def test_root_starts_and_rewinds_nobody_elses_run(config: Path, words: list[str]) -> None:
    done = run_learner(config, *words)
    folder = config.parent / "run"
    assert (done.returncode, done.stderr) == (
        2,
        f"chord-learner: run.dir: {folder} belongs to the user {STRANGER}, got root, expected that user, who could not "
        "change what root leaves there\n",
    )
    assert {path.stat().st_uid for path in [folder, *folder.rglob("*")]} == {STRANGER}


def test_a_user_who_may_not_enter_the_run_is_told_so_in_one_line(config: Path) -> None:
    folder = config.parent / "run"
    folder.chmod(0o700)
    os.seteuid(STRANGER + 1)
    try:
        with pytest.raises(OperatorError) as refused:
            start(config=config, rewind=0)
    finally:
        os.seteuid(0)
    assert str(refused.value) == (
        f"run.dir: {folder}/ledger.sqlite: Permission denied, expected a run of the user who starts this "
        f"(user {STRANGER + 1})"
    )


def test_a_look_at_a_run_keeps_no_learner_out_and_another_learner_does(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    with (tmp_path / ".lock").open("w") as looker:
        fcntl.flock(looker, fcntl.LOCK_SH)
        threading.Timer(0.2, lambda: fcntl.flock(looker, fcntl.LOCK_UN)).start()
        lock = run_dir.lock()
    assert run_dir.is_in_use()
    with pytest.raises(OperatorError, match="is in use by another learner"):
        run_dir.lock()
    os.close(lock)
    assert not run_dir.is_in_use()
