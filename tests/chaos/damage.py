"""Damage to durable files: flipped bits and lost ends, and the history that a damaged run must not go on without."""

import hashlib
import random
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from enum import StrEnum
from pathlib import Path

from common.errors import OperatorError
from learner.ledger.bodies import Bodies, Place


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
    """One file of each kind that a run keeps and reads again: damage is drawn among kinds, not among sizes. The expert
    store lies beside the run directory."""
    kinds = [
        [run_dir / "ledger.sqlite"],
        [run_dir / "ledger.sqlite-wal"],
        [run_dir / "ledger.mark"],
        sorted(run_dir.glob("ledger.bodies/*")),
        [run_dir.parent / "expert.sqlite"],
        [run_dir / "checkpoints" / "newest"],
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


@contextmanager
def opened_copy(database: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a copy, so that the files themselves stay as a crash left them."""
    with tempfile.TemporaryDirectory() as scratch:
        for path in database.parent.glob(f"{database.name}*"):
            if not path.name.endswith("-shm"):
                shutil.copy(path, scratch)
        with closing(sqlite3.connect(Path(scratch) / database.name)) as connection:
            connection.row_factory = sqlite3.Row
            yield connection


def dump_tables(database: Path) -> dict[str, list[tuple[object, ...]]]:
    """Every row of every table."""
    with opened_copy(database) as connection:
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return {
            name: sorted((tuple(row) for row in connection.execute(f"SELECT * FROM {name}")), key=repr)
            for name in sorted(names)
        }


NOTICED = "is not what its hash says"
"""A body that whoever reads it refuses: it cannot be trained on, and is gone once checkpoints cover its step."""


def ledger_history(ledger: Path) -> dict[str, str]:
    """What never changes once it is written: the composition of each step, and the body of each group."""
    with opened_copy(ledger) as connection:
        batches = connection.execute("SELECT step, group_ids, expert_row_ids FROM batches").fetchall()
        found = {f"batch {row['step']}": f"{row['group_ids']} {row['expert_row_ids']}" for row in batches}
        bodies = Bodies(ledger.with_suffix(".bodies"))
        for group_id, *place in connection.execute("SELECT group_id, file, start, size, hash FROM bodies"):
            body = bodies.read(Place(*place))
            found[f"body {group_id}"] = hashlib.blake2b(body, digest_size=16).hexdigest() if body else NOTICED
        return found


def try_damage(
    template: Path, name: str, look: Callable[[Path], object], *, count: int, seed: int
) -> tuple[Counter[str], list[str]]:
    """Damage `name` in `count` copies of the folder `template`, and `look` at each.

    `look` must raise OperatorError naming the file, or return what it returns of the undamaged folder. Returns how
    often it did which, and a line for each time that it did neither.
    """
    chance, outcomes, wrong = random.Random(seed), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as scratch:
        expected = look(Path(shutil.copytree(template, Path(scratch) / "undamaged")))
        for number in range(count):
            folder = Path(shutil.copytree(template, Path(scratch) / str(number)))
            damage = chance.choice(list(Damage))
            what = f"{damage} {name} at {damage.apply(folder / name, chance)}"
            try:
                outcome = "unharmed" if look(folder) == expected else "another content"
            except OperatorError as error:
                is_named = Path(name).name.removesuffix("-wal") in str(error)
                outcome = "refused" if is_named and "\n" not in str(error) else f"not named: {error}"
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"
            outcomes[outcome.partition(":")[0]] += 1
            if outcome not in ("unharmed", "refused"):
                wrong.append(f"{what}: {outcome}")
            shutil.rmtree(folder)
    return outcomes, wrong
