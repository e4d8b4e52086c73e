"""What makes a file or a folder outlive a power cut."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Returns once the content of the file, or the names in the folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
