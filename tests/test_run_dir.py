"""The run directory: another user's is left as it was, and a run is deleted without what is not its own."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import learner.rewind  # noqa: F401 - before the test gives up its rights
from common.config.run import SinkName
from common.config.schema import Config
from common.errors import OperatorError
from common.run_dir import RunDir
from learner.__main__ import learner as start
from learner.handover import kept_policy
from learner.ledger.ledger import Ledger
from tests.runs import QUIET, run_module, write_config

STRANGER = 54321
"""A user without a name."""

roots_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a folder away")


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


@roots_only
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


@roots_only
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


def make_run(folder: Path) -> RunDir:
    """One of everything that a run writes, as far as it goes by RunDir, and a policy kept for the handover."""
    config = Config.model_validate({"run": {"dir": str(folder)}})
    run_dir = RunDir(folder)
    run_dir.create()
    run_dir.save_config(config)
    os.close(run_dir.lock())
    Ledger(run_dir.ledger, groups_per_step=1, max_staleness=1).close()
    files = [run_dir.metrics, run_dir.evaluations, run_dir.summary, run_dir.status, kept_policy(config, 2)]
    files += [run_dir.samples(2), run_dir.weights("learner") / "2", *(run_dir.sink(name) / "x" for name in SinkName)]
    files += [folder / name / "x" for name in ("checkpoints", "final", "excerpts", "logs")]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return run_dir


def test_a_fresh_start_deletes_the_run_and_nothing_of_its_user(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    own = ["demos.sqlite", "demos.sqlite-shm", "demos.sqlite-wal", "expert.sqlite", "keys", "problems.jsonl"]
    for name in own:
        (run_dir.path / name).touch()
    run_dir.clear(named={"expert.path": str(run_dir.path / "demos.sqlite"), "network.keys": ""})
    assert sorted(path.name for path in run_dir.path.iterdir()) == own
    run_dir.clear(named={})
    assert sorted(path.name for path in run_dir.path.iterdir()) == own


def test_a_link_in_a_run_goes_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    shutil.rmtree(run_dir.checkpoints)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").touch()
    run_dir.checkpoints.symlink_to(tmp_path / "elsewhere")
    run_dir.clear(named={})
    assert list(run_dir.path.iterdir()) == []
    assert (tmp_path / "elsewhere" / "x").exists()


def test_what_the_next_run_is_made_from_is_not_deleted_with_the_last_one(tiny_model: Path, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    before = sorted(run_dir.path.rglob("*"))
    words = ["--fresh", "--config", str(write_config(tmp_path, tiny_model)), f"expert.path={run_dir.final / 'x'}"]
    refused = run_module("common.local", *words, check=False)
    assert (refused.returncode, refused.stderr) == (
        2,
        f"chord-local: expert.path: got {run_dir.final / 'x'}, which --fresh would delete, expected it outside of "
        f"{run_dir.final}\n",
    )
    assert sorted(run_dir.path.rglob("*")) == before


def test_a_folder_of_the_same_names_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    for name in ("logs", "checkpoints"):
        (tmp_path / name).mkdir()
    with pytest.raises(OperatorError, match="holds something else than a run, expected an earlier run or nothing"):
        RunDir(tmp_path).clear(named={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "logs"]
