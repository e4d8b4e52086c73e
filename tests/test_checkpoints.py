"""Checkpoints: complete or absent, and never used where a byte of them is wrong."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import OperatorError
from learner.checkpoints import MANIFEST, Checkpoint, Checkpoints

FILES = {"model.bin": b"weights" * 1000, "ranks/optimizer-0.bin": b"moments" * 500, "ranks/empty": b""}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def write(checkpoints: Checkpoints, step: int) -> Path:
    """What the ranks do between begin and finish; every step's files differ."""
    checkpoints.begin(step)
    for name, data in FILES.items():
        path = checkpoints.partial_path(step) / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data + (str(step).encode() if data else b""))
    return checkpoints.partial_path(step)


def save(checkpoints: Checkpoints, *steps: int) -> Checkpoint:
    for step in steps:
        write(checkpoints, step)
        saved = checkpoints.finish(step, parameters_hash=f"parameters {step}")
    return saved


def steps(checkpoints: Checkpoints) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints.all()]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_finished_checkpoint_is_found_with_all_its_files(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest_good() is None
    saved = save(checkpoints, 5)
    assert checkpoints.newest_good() == saved == Checkpoint(saved.path, 5)
    for name, data in FILES.items():
        assert (saved.path / name).read_bytes() == data + (b"5" if data else b"")
    manifest = json.loads((saved.path / MANIFEST).read_text())
    assert manifest["step"] == 5
    assert manifest["files"].keys() == FILES.keys()
    assert manifest["files"]["model.bin"]["num_bytes"] == 7001
    assert len({entry["hash"] for entry in manifest["files"].values()}) == len(FILES)


def test_an_unfinished_checkpoint_is_absent_and_the_next_one_clears_it_away(checkpoints: Checkpoints) -> None:
    saved = save(checkpoints, 5)
    partial = write(checkpoints, 10)
    (partial / MANIFEST).write_text("{}")
    assert checkpoints.newest_good() == saved
    write(checkpoints, 15)
    assert not partial.exists()
    checkpoints.finish(15, parameters_hash="")
    assert steps(checkpoints) == [5, 15]


def test_the_same_checkpoint_may_be_written_again(checkpoints: Checkpoints) -> None:
    save(checkpoints, 5)
    flip(save(checkpoints, 10).path / "model.bin", 0)
    saved = save(checkpoints, 10)
    assert checkpoints.newest_good() == saved
    assert steps(checkpoints) == [5, 10]


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for keep in (1, 2, 3):
        checkpoints = Checkpoints(tmp_path / str(keep), keep=keep)
        save(checkpoints, 9, 10, 11, 100, 1000)
        assert steps(checkpoints) == [9, 10, 11, 100, 1000][-keep:]


def test_what_somebody_else_put_there_is_left_alone(checkpoints: Checkpoints) -> None:
    saved = save(checkpoints, 5)
    copy = shutil.copytree(saved.path, saved.path.with_name("step-00000005.backup"))
    save(checkpoints, 10, 15)
    assert steps(checkpoints) == [10, 15]
    assert copy.exists()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "first byte flipped": lambda folder: flip(folder / "model.bin", 0),
    "last byte flipped": lambda folder: flip(folder / "ranks/optimizer-0.bin", -1),
    "truncated": lambda folder: truncate(folder / "model.bin"),
    "emptied": lambda folder: (folder / "model.bin").write_bytes(b""),
    "grown": lambda folder: (folder / "ranks/empty").write_bytes(b"x"),
    "missing file": lambda folder: (folder / "ranks/optimizer-0.bin").unlink(),
    "missing empty file": lambda folder: (folder / "ranks/empty").unlink(),
    "missing manifest": lambda folder: (folder / MANIFEST).unlink(),
    "truncated manifest": lambda folder: truncate(folder / MANIFEST),
    "empty manifest": lambda folder: (folder / MANIFEST).write_text(""),
    "manifest of another kind": lambda folder: (folder / MANIFEST).write_text("[1]"),
    "manifest without hashes": lambda folder: (folder / MANIFEST).write_text('{"files": {"model.bin": {}}}'),
    "half deleted": lambda folder: shutil.rmtree(folder / "ranks"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    damage: str, checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    good = save(checkpoints, 5)
    damaged = save(checkpoints, 10)
    DAMAGE[damage](damaged.path)
    with caplog.at_level(logging.ERROR):
        assert checkpoints.newest_good() == good
    (line,) = caplog.messages
    assert f"{damaged.path} is damaged (" in line
    assert line.endswith("trying the one before it")


def test_no_flipped_byte_of_a_manifest_leads_to_other_files(checkpoints: Checkpoints) -> None:
    save(checkpoints, 5)
    newest = save(checkpoints, 10)
    good = (newest.path / MANIFEST).read_bytes()
    for position in range(len(good)):
        flip(newest.path / MANIFEST, position)
        found = checkpoints.newest_good()
        assert found
        if found == newest:  # the step or white space: every file was still checked
            assert json.loads((newest.path / MANIFEST).read_bytes())["files"] == json.loads(good)["files"]
        (newest.path / MANIFEST).write_bytes(good)


def test_checkpoints_that_are_all_damaged_end_the_start(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (5, 10):
        flip(save(checkpoints, step).path / "model.bin", 3)
    with pytest.raises(OperatorError, match=r"checkpoints: every checkpoint is damaged, expected a good one"):
        checkpoints.newest_good()
    assert [f"step-{step:08d}" in line for step, line in zip((10, 5), caplog.messages, strict=True)] == [True, True]


def test_a_rewind_that_was_cut_short_is_done_again_to_its_end(checkpoints: Checkpoints) -> None:
    save(checkpoints, 4, 6)
    checkpoints._point_to("step-00000004")  # where a kill left it: nothing is deleted yet
    assert steps(checkpoints) == [4]
    checkpoints.rewind(4)
    save(checkpoints, 8)
    assert steps(checkpoints) == [4, 8]


@pytest.mark.parametrize("damage", [lambda text: "", lambda text: text.replace("6", "4")], ids=["cut", "flipped"])
def test_a_damaged_pointer_hides_no_checkpoint(checkpoints: Checkpoints, damage: Callable[[str], str]) -> None:
    folder = save(checkpoints, 4, 6).path.parent
    pointer = folder / "newest"
    pointer.write_text(damage(pointer.read_text()))
    found = checkpoints.newest_good()
    assert found
    assert found.step == 6


def test_a_damaged_checkpoint_pushes_no_good_one_out(checkpoints: Checkpoints) -> None:
    save(checkpoints, 4)
    flip(save(checkpoints, 6).path / "model.bin", 0)
    found = checkpoints.newest_good()
    assert found
    assert found.step == 4
    save(checkpoints, 8)
    assert {4, 8} <= set(steps(checkpoints))
    assert checkpoints.covered_step == 4


def test_a_run_whose_groups_are_all_kept_can_do_without_its_only_checkpoint(checkpoints: Checkpoints) -> None:
    flip(save(checkpoints, 4).path / "model.bin", 0)
    assert checkpoints.newest_good(can_begin_anew=True) is None
    with pytest.raises(OperatorError, match="every checkpoint is damaged"):
        checkpoints.newest_good()
