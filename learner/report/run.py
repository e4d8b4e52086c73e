"""A run as a report finds it: the files for readers in its run directory, whether it is over or going on."""

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import OperatorError
from common.run_dir import RunDir
from learner.ledger.account import Account
from learner.ledger.database import Database
from learner.ledger.leases import DropReason


@dataclass(frozen=True)
class Run:
    """What there is of one run; nothing of it is required but the folder."""

    name: str
    run_dir: RunDir
    config: dict[str, Any]
    """config.toml as it is written: a report of an older run does not ask whether its keys are today's."""
    lines: list[dict[str, Any]]
    """Of metrics.jsonl."""
    evaluations: list[dict[str, Any]]
    """Lines of eval.jsonl."""
    summary: dict[str, Any]
    """Empty until the run has ended."""
    status: dict[str, Any]
    """What the learner does now; empty where none runs."""
    answer_lengths: list[tuple[float, bool]]
    """See Account.answer_lengths."""
    num_too_old: int
    """Groups that were dropped because they were staler than is allowed."""
    notes: list[str]
    """What could not be read, and why."""

    def setting(self, section: str, key: str) -> Any:
        """None where the configuration does not say."""
        return self.config.get(section, {}).get(key)

    @property
    def num_steps(self) -> int:
        """Optimizer steps completed."""
        return self.lines[-1]["step"] if self.lines else 0


def read_run(path: Path, *, name: str) -> Run:
    """Raises OperatorError where `path` holds no run, or a line that is no JSON."""
    run_dir, notes = RunDir(path), list[str]()
    if not run_dir.config.exists():
        raise OperatorError(f"{path}: holds no config.toml, expected the run.dir of a run whose learner has started")
    return Run(
        name=name,
        run_dir=run_dir,
        config=tomllib.loads(run_dir.config.read_text(encoding="utf-8")),
        lines=_read_lines(run_dir.metrics),
        evaluations=_read_lines(run_dir.evaluations),
        summary=_read_object(run_dir.summary),
        status=_read_object(run_dir.status) if run_dir.is_in_use() else {},
        notes=notes,
        **_read_ledger(run_dir.ledger, notes),
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Without the end of a line that is being written."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if line.endswith("\n"):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise OperatorError(
                    f"{path}:{number}: {error}, expected JSON (the learner mends it at its start)"
                ) from error
    return found


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _read_ledger(ledger: Path, notes: list[str]) -> dict[str, Any]:
    nothing = {"answer_lengths": [], "num_too_old": 0}
    if not ledger.exists():
        return nothing
    try:
        database = Database(ledger, is_read_only=True)
    except OperatorError as error:
        notes.append(str(error))
        return nothing
    try:
        account = Account(database)
        return {
            "answer_lengths": account.answer_lengths(),
            "num_too_old": account.dropped().get(DropReason.STALE, 0),
        }
    finally:
        database.close()
