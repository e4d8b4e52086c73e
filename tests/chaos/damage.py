"""Damage to durable files: flipped bits and lost ends, and the history that a damaged run must not go on without."""

import hashlib
import random
import shutil
import sqlite3
import tempfile
from contextlib import closing
from enum import StrEnum
from pathlib import Path


class Damage(StrEnum):
    """What a disk does to a file."""

    FLIP = "bit flip in"
    TRUNCATE = "truncation of"

    def apply(self, path: Path, chance: random.Random) -> int:
        """Damage the file at a place drawn by chance; returns that place, in bytes."""
        size = path.stat().st_size
        at = chance.randrange(size)
        if self is Damage.TRUNCATE:
            with path.open("r+b") as file:
                file.truncate(at)
        else:
            flip(path, at, chance.randrange(8))
        return at


def flip(path: Path, at: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (value,) = file.read(1)
        file.seek(at)
        file.write(bytes([value ^ (1 << bit)]))


def durable_files(run_dir: Path, chance: random.Random) -> list[Path]:
    """One file of each kind that a run keeps and reads again: damage is drawn among kinds, not among sizes."""
    kinds = [
        [run_dir / "ledger.sqlite"],
        [run_dir / "ledger.sqlite-wal"],
        sorted(run_dir.glob("checkpoints/step-*/manifest.json"))[-1:],
        sorted(path for path in _newest(run_dir / "checkpoints").rglob("*") if path.name != "manifest.json"),
        [run_dir / "metrics.jsonl"],
        [run_dir / "eval.jsonl"],
        sorted(run_dir.glob("weights/learner/*.safetensors")),
    ]
    present = [[path for path in kind if path.is_file() and path.stat().st_size] for kind in kinds]
    return [chance.choice(kind) for kind in present if kind]


def _newest(folder: Path) -> Path:
    return max(folder.glob("step-*"), default=folder / "none")


def dump_tables(ledger: Path) -> dict[str, list[tuple[object, ...]]]:
    """Every row of every table, read from a copy, so that the file stays as the crash left it."""
    with tempfile.TemporaryDirectory() as scratch:
        for path in ledger.parent.glob(f"{ledger.name}*"):
            if not path.name.endswith("-shm"):
                shutil.copy(path, scratch)
        with closing(sqlite3.connect(Path(scratch) / ledger.name)) as database:
            names = [row[0] for row in database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
            return {name: sorted(database.execute(f"SELECT * FROM {name}"), key=repr) for name in sorted(names)}


def ledger_history(ledger: Path) -> dict[str, str]:
    """What never changes once it is written: the composition of each step, and the body of each group."""
    with tempfile.TemporaryDirectory() as scratch:
        for path in ledger.parent.glob(f"{ledger.name}*"):
            if not path.name.endswith("-shm"):
                shutil.copy(path, scratch)
        with closing(sqlite3.connect(Path(scratch) / ledger.name)) as database:
            database.row_factory = sqlite3.Row
            batches = database.execute("SELECT step, group_ids, expert_row_ids FROM batches").fetchall()
            found = {f"batch {row['step']}": f"{row['group_ids']} {row['expert_row_ids']}" for row in batches}
            for row in database.execute("SELECT group_id, body FROM bodies"):
                found[f"body {row['group_id']}"] = hashlib.blake2b(row["body"], digest_size=16).hexdigest()
            return found
