"""What the runs' excerpts hold, laid out for the page: a record for each answer, columns for all tokens.

A demonstration is the one answer of a group of its own. Where there are more tokens than a page may have, whole steps
are left out, evenly.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from common.trajectory import NOT_SAMPLED
from learner.excerpts.folder import SCHEMA, ExcerptFolder
from learner.report.pieces import Pieces
from learner.report.run import Run

NOTHING = -(1 << 15)
"""In a column of log-probs: there is none."""
PER_NAT = 1000.0
"""Log-probs are kept in thousandths, as int16."""


COLUMNS = {"tokens": np.uint32, "prompts": np.uint32, "policy": np.int16, "behavior": np.int16, "versions": np.int32}


@dataclass(frozen=True)
class Records:
    """Answers and demonstrations, one after the other."""

    groups: list[dict[str, Any]]
    """`run`, `step`, `id` (of the group or the expert row), `actor`, `isExpert`, `prompt` (span in `prompts`)."""
    answers: list[dict[str, Any]]
    """`group` (place in `groups`), `tokens` (span in the other columns), `number`, `reward`, `advantage`,
    `isTruncated`, `staleness` (largest), `ratio` (the one farthest from 1), `phi` (mean); None for what it lacks."""
    columns: dict[str, NDArray[Any]]
    """`tokens` and `prompts` (places in `vocabulary`), `policy` and `behavior` (log-probs), `versions`."""
    vocabulary: list[bytes]
    num_left_out: int
    """Answers that the page has no room for."""


def gather(runs: Sequence[Run], *, max_tokens: int) -> Records:
    """Read the excerpts of all runs. Every file that cannot be read becomes a note of its run."""
    tables = [(r, table) for r, run in enumerate(runs) for table in _read(run)]
    kept = _spread(tables, max_tokens)
    sheet = _Sheet()
    for r, table in kept:
        for row in _rows(table):
            sheet.add(r, row)
    num_left_out = sum(len(table) for _, table in tables) - len(sheet.answers)
    return Records(sheet.groups, sheet.answers, sheet.columns(), _vocabulary(runs, sheet.places), num_left_out)


class _Sheet:
    """Rows of excerpts, laid out one after the other."""

    def __init__(self) -> None:
        self.groups: list[dict[str, Any]] = []
        self.answers: list[dict[str, Any]] = []
        self.places: dict[tuple[int, int], int] = {}
        """(run, token) → place in the vocabulary of the page, which grows by tokens that are new to it."""
        self._parts: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self._ends = dict.fromkeys(COLUMNS, 0)

    def add(self, r: int, row: dict[str, Any]) -> None:
        group = _group(r, row)
        if not (self.groups and group.items() <= self.groups[-1].items()):
            self.groups.append({**group, "prompt": self._append("prompts", self._place(r, row["prompt"]))})
        span = self._append("tokens", self._place(r, row["tokens"]))
        self._append("policy", _thousandths(row["policy_logprobs"]))
        self._append("behavior", _thousandths(_or(row["behavior_logprobs"], np.nan, row)))
        self._append("versions", _or(row["versions"], NOT_SAMPLED, row))
        self.answers.append({"group": len(self.groups) - 1, "tokens": span, **_answer(row)})

    def columns(self) -> dict[str, NDArray[Any]]:
        return {name: np.concatenate([np.zeros(0), *self._parts[name]]).astype(kind) for name, kind in COLUMNS.items()}

    def _append(self, name: str, values: Sequence[int] | NDArray[Any]) -> list[int]:
        """Returns their span: the first, and the end."""
        start = self._ends[name]
        self._ends[name] = start + len(values)
        self._parts[name].append(values)
        return [start, self._ends[name]]

    def _place(self, r: int, tokens: NDArray[Any]) -> list[int]:
        return [self.places.setdefault((r, token), len(self.places)) for token in tokens.tolist()]


def _vocabulary(runs: Sequence[Run], places: Iterable[tuple[int, int]]) -> list[bytes]:
    pieces = [Pieces(tokenizer_folder(run)) for run in runs]
    for r in {r for r, _ in places}:
        if not pieces[r].has_text:
            path = runs[r].setting("model", "path")
            runs[r].notes.append(f"no {path}/tokenizer.json here: tokens are shown as numbers")
    return [pieces[r].bytes_of(token) for r, token in places]


def tokenizer_folder(run: Run) -> Path | None:
    """The model that the run began with, or the one that it ended with; None where neither is here."""
    folders = [Path(run.setting("model", "path") or "."), run.run_dir.final]
    return next((folder for folder in folders if (folder / "tokenizer.json").is_file()), None)


def _read(run: Run) -> Iterator[pa.Table]:
    for path in ExcerptFolder(run.run_dir.excerpts).files().values():
        try:
            yield pq.read_table(path, schema=SCHEMA)
        except FileNotFoundError:
            pass  # thinned out since it was listed
        except (OSError, pa.ArrowException) as error:
            run.notes.append(f"{path}: {error}")


def _spread(tables: list[tuple[int, pa.Table]], max_tokens: int) -> list[tuple[int, pa.Table]]:
    """Of the steps every n-th, counted from the newest, with the smallest n at which their tokens are few enough."""
    sizes = [pc.sum(pc.list_value_length(table["tokens"])).as_py() or 0 for _, table in tables]
    n = 1
    while n < len(tables) and sum(sizes[::-1][::n]) > max_tokens:
        n += 1
    return tables[::-1][::n][::-1]


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """With lists as arrays."""
    lists = [name for name in table.column_names if pa.types.is_list(table.schema.field(name).type)]
    plain = table.drop_columns(lists).to_pylist()
    for n, row in enumerate(plain):
        arrays = {name: table[name][n].values for name in lists}
        yield row | {name: None if found is None else found.to_numpy() for name, found in arrays.items()}


def _group(r: int, row: dict[str, Any]) -> dict[str, Any]:
    is_expert = row["group_id"] is None
    found = row["expert_row_id"] if is_expert else row["group_id"]
    return {"run": r, "step": row["step"], "id": found, "actor": row["actor_id"], "isExpert": is_expert}


def _or(values: NDArray[Any] | None, nothing: float, row: dict[str, Any]) -> NDArray[Any]:
    """What a demonstration lacks is `nothing` for every token."""
    return np.full(len(row["tokens"]), nothing) if values is None else values


def _thousandths(logprobs: NDArray[np.float32]) -> NDArray[Any]:
    rounded = np.clip(np.rint(np.nan_to_num(logprobs) * PER_NAT), NOTHING + 1, 0)
    return np.where(np.isfinite(logprobs), rounded, NOTHING)


def _answer(row: dict[str, Any]) -> dict[str, Any]:
    answer = {
        "number": row["trajectory"] or 0,
        "reward": _short(row["reward"]),
        "advantage": _short(row["advantage"]),
        "isTruncated": bool(row["is_truncated"]),
        "staleness": None,
        "ratio": None,
        "phi": None,
    }
    policy = row["policy_logprobs"]
    if row["group_id"] is None:
        p = np.exp(policy[np.isfinite(policy)])
        return answer | {"phi": _short(float((p * (1 - p)).mean())) if len(p) else None}
    lags = row["step"] - 1 - row["versions"][row["versions"] >= 0]
    logs = policy - row["behavior_logprobs"]
    logs = logs[np.isfinite(logs)]
    farthest = float(logs[np.abs(logs).argmax()]) if len(logs) else None
    return answer | {
        "staleness": int(lags.max()) if len(lags) else None,
        "ratio": None if farthest is None else _short(float(np.exp(min(farthest, 20.0)))),
    }


def _short(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.4g}")
