"""Checkpoints on disk: complete or absent, checked before use, the newest good one wins.

A checkpoint is written beside its place, synced, described by a manifest, and renamed; the pointer names it last. What
the pointer does not name yet does not count.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import OperatorError
from learner.durable import sync

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
POINTER = "newest"
WRITERS_WORDS = ("iostream error", "inline_container", "I/O error", "No space left", "os error")
"""What torch and safetensors say when a disk refuses."""


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint: the state after `step` optimizer steps."""

    path: Path
    step: int

    @property
    def written_at(self) -> float:
        """Unix time."""
        return (self.path / MANIFEST).stat().st_mtime


class Checkpoints:
    """The folder `checkpoints/` of a run."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self._damaged: set[int] = set()
        """Steps whose checkpoint was seen to be damaged; they do not count among those that are kept."""
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """What goes wrong inside because of the disk becomes an OperatorError, whatever words its writer has for it."""
        try:
            yield
        except OperatorError:
            raise
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            if not isinstance(error, OSError) and not any(word in str(error) for word in WRITERS_WORDS):
                raise
            raise OperatorError(
                f"{self._folder}: a checkpoint cannot be written ({first}), expected a disk that takes one"
            ) from error

    def partial_path(self, step: int) -> Path:
        """Where the ranks write the checkpoint of `step`."""
        return self._folder / f".partial-{step:08d}"

    def begin(self, step: int) -> None:
        """Clear the way; rank 0, before the ranks write. Raises OperatorError where the disk refuses."""
        with self.reporting():
            for leftover in self._folder.glob(".partial-*"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            self.partial_path(step).mkdir()

    def finish(self, step: int, *, parameters_hash: str) -> Checkpoint:
        """Sync, describe and publish what the ranks wrote; then forget the oldest. Rank 0, after the ranks wrote.

        `parameters_hash` names the parameters in it, for whoever replays the run. Raises OperatorError where the disk
        refuses.
        """
        with self.reporting():
            return self._finish(step, parameters_hash)

    def _finish(self, step: int, parameters_hash: str) -> Checkpoint:
        partial = self.partial_path(step)
        files = {str(file.relative_to(partial)): _describe(file) for file in _files(partial)}
        manifest = {"step": step, "parameters_hash": parameters_hash, "files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for file in _files(partial):
            sync(file)
        for folder in [partial, *[path for path in partial.rglob("*") if path.is_dir()]]:
            sync(folder)
        final = self.path_of(step)
        if final.exists():
            self._forget(final)
        partial.rename(final)
        sync(self._folder)
        self._point_to(final.name)
        self._damaged.discard(step)
        oldest = self._kept()[0].step
        for old in self.all():
            if old.step < oldest:
                self._forget(old.path)
        return Checkpoint(final, step)

    def _kept(self) -> list[Checkpoint]:
        return [one for one in self.all() if one.step not in self._damaged][-self._keep :]

    @property
    def covered_step(self) -> int:
        """What came before this step is in every kept checkpoint; 0 while there are fewer than are to be kept."""
        kept = self._kept()
        return kept[0].step if len(kept) == self._keep else 0

    def path_of(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"

    def all(self) -> list[Checkpoint]:
        """Every finished checkpoint, oldest first."""
        pointed = self._pointed()
        names = sorted(path.name for path in self._present())
        return [Checkpoint(self._folder / name, int(name[5:])) for name in names if pointed is None or name <= pointed]

    def _present(self) -> list[Path]:
        """Whatever looks like a checkpoint, pointed to or not."""
        return [path for path in self._folder.glob("step-*") if path.name[5:].isdigit()]

    def newest_good(self, *, can_begin_anew: bool = False) -> Checkpoint | None:
        """The newest checkpoint whose files are those of its manifest; damaged ones are named and passed by.

        Raises OperatorError where there are checkpoints, but none is good, unless the run can be replayed from its
        begin (`can_begin_anew`).
        """
        found = self.all()
        for checkpoint in reversed(found):
            damage = self.damage(checkpoint)
            if damage is None:
                return checkpoint
            self._damaged.add(checkpoint.step)
            log.error("checkpoint %s is damaged (%s): trying the one before it", checkpoint.path, damage)
        if found and not can_begin_anew:
            raise OperatorError(
                f"{self._folder}: every checkpoint is damaged, expected a good one; restore it or use a new run.dir"
            )
        return None

    def require(self, step: int) -> None:
        """Raises OperatorError where the state after `step` steps cannot be had; that after 0 always can."""
        good = [checkpoint.step for checkpoint in self.all() if self.damage(checkpoint) is None]
        if step not in (0, *good):
            raise OperatorError(f"{self._folder}: got step {step}, expected 0 or one with a good checkpoint: {good}")

    def rewind(self, step: int) -> None:
        """Forget every checkpoint after `step`; 0 forgets all. Cut short, it can be done again."""
        self._point_to(self.path_of(step).name if step else "")
        for path in self._present():
            if int(path.name[5:]) > step:
                self._forget(path)

    def _forget(self, path: Path) -> None:
        """Take it out of sight first: half of one must not look like a damaged one."""
        doomed = self._folder / f".partial-{path.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)

    def parameters_hash(self, checkpoint: Checkpoint) -> str:
        return str(_read_manifest(checkpoint)["parameters_hash"])

    def damage(self, checkpoint: Checkpoint) -> str | None:
        """What is wrong with a checkpoint; None where its files are those that were written."""
        return next(self._damage(checkpoint), None)

    def _pointed(self) -> str | None:
        """Name of the newest finished checkpoint, "" for none; None where no pointer tells."""
        path = self._folder / POINTER
        if not path.exists():
            return None
        name, _, digest = path.read_text(errors="replace").partition(" ")
        if digest != _digest(name):
            log.error("%s is damaged: every checkpoint beside it is looked at", path)
            return None
        return name

    def _point_to(self, name: str) -> None:
        partial = self._folder / f".partial-{POINTER}"
        partial.write_text(f"{name} {_digest(name)}")
        sync(partial)
        partial.rename(self._folder / POINTER)
        sync(self._folder)

    def _damage(self, checkpoint: Checkpoint) -> Iterator[str]:
        try:
            manifest = _read_manifest(checkpoint)
            files, step = dict(manifest["files"]), manifest["step"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            yield f"{MANIFEST}: {error}"
            return
        if step != checkpoint.step:
            yield f"{MANIFEST}: got step {step}, expected {checkpoint.step}"
        for name, expected in files.items():
            path = checkpoint.path / name
            if not path.is_file():
                yield f"{name}: missing"
            elif _describe(path) != expected:
                yield f"{name}: its bytes are not those that were written"


def _digest(name: str) -> str:
    return hashlib.blake2b(name.encode(), digest_size=8).hexdigest()


def _read_manifest(checkpoint: Checkpoint) -> dict[str, Any]:
    return json.loads((checkpoint.path / MANIFEST).read_text())


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _describe(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
    return {"num_bytes": path.stat().st_size, "hash": digest.hexdigest()}
