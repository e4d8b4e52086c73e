"""Damage to durable files is named and stops the start, or does no harm; nothing corrupt is ever taken for good."""

import gc
import json
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from common.errors import OperatorError
from common.local.__main__ import steps_done
from common.run_dir import RunDir
from learner.checkpoints import Checkpoints
from learner.expert.store import ExpertStore
from learner.ledger.ledger import Ledger
from learner.recorder import Recorder
from tests.chaos.crash_points import CheckpointWriter, LedgerWriter
from tests.chaos.damage import Damage, dump_tables, try_damage
from tests.runs import import_experts, write_config

COUNT = 40
"""Trials of each file."""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """What a crash after two optimizer steps leaves behind: part of the ledger in its file, part in the WAL."""
    folder = tmp_path_factory.mktemp("damage")
    template = folder / "template"
    template.mkdir()
    writer = LedgerWriter(folder / "ledger")
    writer.prepare(folder / "live")
    keeper = sqlite3.connect(folder / "live" / "ledger.sqlite")  # an open reader keeps the WAL from being cleared away
    with closing(keeper):
        keeper.execute("SELECT count(*) FROM groups").fetchone()
        writer.write(folder / "live", lambda _: None)
        for name in ("ledger.sqlite", "ledger.sqlite-wal"):
            shutil.copy(folder / "live" / name, template / name)
        for extra in (folder / "live").glob("ledger*"):
            if extra.is_dir():
                shutil.copytree(extra, template / extra.name)
            elif not extra.name.startswith("ledger.sqlite"):
                shutil.copy(extra, template / extra.name)
    CheckpointWriter(folder / "checkpoints")
    shutil.copytree(folder / "checkpoints" / "template", template / "checkpoints")
    config = write_config(folder, tiny_model)
    import_experts(config)
    for path in folder.glob("expert.sqlite*"):
        shutil.copy(path, template / path.name)
    lines = [json.dumps({"step": step, "reward_mean": 0.5, "run_wall_s": 1.0}) + "\n" for step in (1, 2)]
    (template / "metrics.jsonl").write_text("".join(lines))
    (template / "eval.jsonl").write_text(lines[0])
    (template / "summary.json").write_text(json.dumps({"steps": 2}))
    (template / "final").mkdir()
    assert (template / "ledger.sqlite-wal").stat().st_size > 10_000
    return template


def open_ledger(folder: Path) -> object:
    """What a start reads, and training after it."""
    ledger = Ledger(folder / "ledger.sqlite", groups_per_step=2, max_staleness=1)
    try:
        bodies = ledger.history.bodies(range(1, sum(vars(ledger.account.counts()).values()) + 1))
    finally:
        ledger.close()
    return bodies, dump_tables(folder / "ledger.sqlite")


def read_experts(folder: Path) -> object:
    store = ExpertStore(folder / "expert.sqlite")
    try:
        store.check()
        return store.fingerprint(), [(row.row_id, row.messages) for row in store.rows()]
    finally:
        store.close()


def restored_lines(folder: Path) -> object:
    ledger = Ledger(folder / "ledger.sqlite", groups_per_step=2, max_staleness=1)
    try:
        Recorder(folder, ledger).restore()
    finally:
        ledger.close()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines], (folder / "eval.jsonl").read_text()


def newest_good_step(folder: Path) -> object:
    found = Checkpoints(folder / "checkpoints", keep=2).newest_good()
    assert found
    return found.step


LOOKS: dict[str, Callable[[Path], object]] = {
    "ledger.sqlite": open_ledger,
    "ledger.sqlite-wal": open_ledger,
    "ledger.mark": open_ledger,
    "ledger.bodies/00000002.bin": open_ledger,
    "expert.sqlite": read_experts,
    "checkpoints/newest": newest_good_step,
    "metrics.jsonl": restored_lines,
    "eval.jsonl": restored_lines,
    "summary.json": lambda folder: isinstance(steps_done(RunDir(folder)), int),
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_damaged_file_is_named_or_does_no_harm(name: str, run_dir: Path) -> None:
    outcomes, wrong = try_damage(run_dir, name, LOOKS[name], count=COUNT, seed=1)
    assert wrong == []
    assert outcomes.total() == COUNT


def test_a_damaged_file_of_a_checkpoint_means_the_checkpoint_before_it(run_dir: Path) -> None:
    for path in sorted((run_dir / "checkpoints" / "step-00000010").rglob("*.*")):
        name = str(path.relative_to(run_dir))
        outcomes, wrong = try_damage(run_dir, name, newest_good_step, count=6, seed=2)
        if path.name == "manifest.json":  # its step and its white space harm nobody
            assert outcomes.keys() <= {"unharmed", "another content"}
        else:
            assert outcomes == {"another content": 6}, wrong


@pytest.mark.parametrize("name", ["ledger.sqlite", "ledger.sqlite-wal"])
def test_a_ledger_that_is_refused_is_left_as_it_was_found(name: str, run_dir: Path, tmp_path: Path) -> None:
    chance, num_refused = random.Random(3), 0
    for number in range(COUNT):
        folder = Path(shutil.copytree(run_dir, tmp_path / str(number)))
        Damage.TRUNCATE.apply(folder / name, chance)
        found = ledger_files(folder)
        try:
            Ledger(folder / "ledger.sqlite", groups_per_step=2, max_staleness=1).close()
            is_refused = False
        except OperatorError:
            is_refused = True
        if is_refused:
            gc.collect()  # SQLite tidies up when the connection is closed
            assert ledger_files(folder) == found
            num_refused += 1
    assert num_refused > COUNT / 3


def ledger_files(folder: Path) -> dict[str, bytes]:
    """All but the index of the log, which is made anew at every opening."""
    files = [path for path in folder.glob("ledger.*") if path.is_file() and not path.name.endswith("-shm")]
    return {path.name: path.read_bytes() for path in files}
