"""Checkpoints on disk: complete or absent, checked before use, the newest good one wins."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import OperatorError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint: the state after `step` optimizer steps."""

    path: Path
    step: int


class Checkpoints:
    """The folder `checkpoints/` of a run. A checkpoint is written beside it and appears by one rename."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        folder.mkdir(parents=True, exist_ok=True)

    def partial_path(self, step: int) -> Path:
        """Where the ranks write the checkpoint of `step`."""
        return self._folder / f".partial-{step:08d}"

    def begin(self, step: int) -> None:
        """Clear the way; rank 0, before the ranks write."""
        for leftover in self._folder.glob(".partial-*"):
            shutil.rmtree(leftover)
        self.partial_path(step).mkdir()

    def finish(self, step: int) -> Checkpoint:
        """Sync, describe and publish what the ranks wrote; then forget the oldest. Rank 0, after the ranks wrote."""
        partial = self.partial_path(step)
        files = {str(file.relative_to(partial)): _describe(file) for file in _files(partial)}
        (partial / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1))
        for file in _files(partial):
            _sync(file)
        for folder in [partial, *[path for path in partial.rglob("*") if path.is_dir()]]:
            _sync(folder)
        final = self._folder / f"step-{step:08d}"
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _sync(self._folder)
        for old in self.all()[: -self._keep]:
            shutil.rmtree(old.path)
        return Checkpoint(final, step)

    def all(self) -> list[Checkpoint]:
        """Every finished checkpoint, oldest first."""
        names = sorted(path.name for path in self._folder.glob("step-*") if path.name[5:].isdigit())
        return [Checkpoint(self._folder / name, int(name[5:])) for name in names]

    def newest_good(self) -> Checkpoint | None:
        """The newest checkpoint whose files are those of its manifest; damaged ones are named and passed by.

        Raises OperatorError where there are checkpoints, but none is good.
        """
        found = self.all()
        for checkpoint in reversed(found):
            damage = next(self._damage(checkpoint), None)
            if damage is None:
                return checkpoint
            log.error("checkpoint %s is damaged (%s): trying the one before it", checkpoint.path, damage)
        if found:
            raise OperatorError(
                f"{self._folder}: every checkpoint is damaged, expected a good one; restore it or use a new run.dir"
            )
        return None

    def _damage(self, checkpoint: Checkpoint) -> Iterator[str]:
        try:
            files = dict(json.loads((checkpoint.path / MANIFEST).read_text())["files"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            yield f"{MANIFEST}: {error}"
            return
        for name, expected in files.items():
            path = checkpoint.path / name
            if not path.is_file():
                yield f"{name}: missing"
            elif _describe(path) != expected:
                yield f"{name}: its bytes are not those that were written"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _describe(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
    return {"num_bytes": path.stat().st_size, "hash": digest.hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
