"""The run directory: the fixed names in it, and the lock that keeps a second learner out."""

import errno
import fcntl
import os
import pwd
import shutil
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from common.config.load import to_toml_document
from common.config.schema import Config
from common.errors import OperatorError

WRITTEN = {
    "config.toml", "config.partial", "local.toml", "local.partial", "ledger.sqlite", "ledger.sqlite-wal",
    "ledger.sqlite-shm", "ledger.mark", "ledger.bodies", "metrics.jsonl", "metrics.partial", "eval.jsonl",
    "eval.partial", "summary.json", "summary.partial", "status.json", "status.partial", "report.html",
    "report.html.partial", "checkpoints", "sft", "weights", "final", ".partial-final", "samples", "excerpts",
    "tensorboard", "wandb", "logs", ".lock",
}  # fmt: skip
"""All names that a run leaves in its directory; whatever else lies there, such as an expert store, is its user's."""
DISK_ERRORS = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS}
RIGHTS_ERRORS = {errno.EACCES, errno.EPERM}
ROOT, NOBODY = 0, 65534
LOOK_S = 1.0
"""For so long a lock that is taken may be that of somebody who only looks whether it is (`is_in_use`)."""
FULL_BYTES = 4 << 20
"""A disk with less room than this is taken for full."""


@dataclass(frozen=True)
class RunDir:
    """Paths in a run directory."""

    path: Path

    @property
    def config(self) -> Path:
        """What the run began or goes on with, as its learner accepted it."""
        return self.path / "config.toml"

    @property
    def local_config(self) -> Path:
        """What chord-local gives its processes; the learner may yet refuse it."""
        return self.path / "local.toml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "eval.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def status(self) -> Path:
        """What the learner does now, written anew twice a second; for live views."""
        return self.path / "status.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.sqlite"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def sink(self, name: str) -> Path:
        """What the sink of that name keeps here."""
        return self.path / name

    def samples(self, step: int) -> Path:
        """The answers that version `step` was scored by, where eval.save_samples keeps them."""
        return self.path / "samples" / f"step-{step:08d}.jsonl"

    @property
    def excerpts(self) -> Path:
        """Token by token, a sample of what the steps trained on; for chord-report."""
        return self.path / "excerpts"

    def weights(self, component: str) -> Path:
        """Snapshots of one component; none outlives its process for long."""
        return self.path / "weights" / component

    def forget_results(self) -> None:
        """The run goes on: what it left at an earlier end holds no longer."""
        self.summary.unlink(missing_ok=True)
        shutil.rmtree(self.final, ignore_errors=True)

    def create(self) -> None:
        """Raises OperatorError where the disk refuses, or the folder is another user's."""
        self.require_own()
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OperatorError(
                f"run.dir: {self.path}: {error.strerror}, expected a folder that can be written"
            ) from error

    def require_own(self) -> None:
        """Raises OperatorError for root in another user's run directory. Nobody's is a network's name for root's."""
        if os.geteuid() != ROOT or not self.path.exists() or (owner := self.path.stat().st_uid) in (ROOT, NOBODY):
            return
        try:
            name = pwd.getpwuid(owner).pw_name
        except KeyError:
            name = str(owner)
        raise OperatorError(
            f"run.dir: {self.path} belongs to the user {name}, got root, expected that user, who could not change what "
            "root leaves there"
        )

    def save_config(self, config: Config) -> None:
        write_config(self.config, config)

    def save_local_config(self, config: Config) -> None:
        write_config(self.local_config, config)

    @contextmanager
    def explains_bad_disk(self) -> Generator[None]:
        """What goes wrong inside because the disk is full or failing, or the run is another user's, becomes one line,
        whatever its writer says."""
        try:
            yield
        except OperatorError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise OperatorError(
                    f"run.dir: {error.filename or self.path}: {error.strerror}, expected a disk that can be written"
                ) from error
            if isinstance(error, OSError) and error.errno in RIGHTS_ERRORS and self._holds(error.filename):
                raise OperatorError(
                    f"run.dir: {error.filename}: {error.strerror}, expected a run of the user who starts this "
                    f"(user {os.geteuid()})"
                ) from error
            free = shutil.disk_usage(self.path).free if self.path.exists() else FULL_BYTES
            if free >= FULL_BYTES:
                raise
            raise OperatorError(
                f"run.dir: the disk of {self.path} is full ({free} bytes free), expected room"
            ) from error

    def _holds(self, name: object) -> bool:
        """Whether the file of that name is the run directory, or in it."""
        return isinstance(name, str | Path) and Path(name).absolute().is_relative_to(self.path.absolute())

    def lock(self) -> int:
        """Keep every other learner out until this process ends. Raises OperatorError where one is in, or the folder is
        another user's."""
        self.require_own()
        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + LOOK_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    raise OperatorError(
                        f"run.dir: {self.path} is in use by another learner, expected a folder of its own"
                    ) from None
            time.sleep(0.05)

    def is_in_use(self) -> bool:
        """Whether a learner has the lock."""
        if not (self.path / ".lock").exists():
            return False
        with (self.path / ".lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def clear(self, *, named: Mapping[str, str]) -> None:
        """Delete an earlier run: what a run writes, and nothing else. `named`: paths in the configuration, by key.

        Raises OperatorError where the folder is not a run's, or one of `named` would go with it.
        """
        written = [path for name in sorted(WRITTEN) if os.path.lexists(path := self.path / name)]
        if not written:
            return
        if not any(path.exists() for path in (self.config, self.ledger, self.path / ".lock")):
            raise OperatorError(
                f"run.dir: {self.path} holds something else than a run, expected an earlier run or nothing"
            )
        for (key, path), doomed in product(named.items(), written):
            if path and Path(path).resolve().is_relative_to(doomed.resolve()):
                raise OperatorError(f"{key}: got {path}, which --fresh would delete, expected it outside of {doomed}")
        os.close(self.lock())
        for path in [*written, self.path / ".lock"]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def write_config(path: Path, config: Config) -> None:
    """It appears by rename: who reads it meanwhile reads the old one or the new one."""
    partial = path.with_suffix(".partial")
    partial.write_text(to_toml_document(config), encoding="utf-8")
    partial.replace(path)
