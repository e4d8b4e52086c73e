"""Scratch folders in memory, where the machine has them: kills need no real disk, and syncs cost nothing there."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY = Path("/dev/shm")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder, deleted at the end."""
    folder = Path(tempfile.mkdtemp(prefix="chord-", dir=MEMORY if MEMORY.is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
