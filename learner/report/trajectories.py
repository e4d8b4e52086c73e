"""What the runs' excerpts hold, laid out for the page: a record for each answer, columns for all tokens.

A demonstration is the one answer of a group of its own. Where there are more tokens than a page may have, whole steps
are left out, evenly.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from learner.excerpts.folder import SCHEMA, ExcerptFolder
from learner.report.pieces import Pieces
from learner.report.run import Run

NOTHING = -(1 << 15)
"""In a column of log-probs: there is none."""
PER_NAT = 1000.0
"""Log-probs are kept in thousandths, as int16."""


@dataclass
class Records:
    """Answers and demonstrations, one after the other; `columns` are of all their tokens in that order."""

    groups: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """`run`, `step`, `id` (of the group or the expert row), `actor`, `isExpert`, `prompt` (first token, end)."""
    answers: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """`group` (place in `groups`), `number`, `reward`, `advantage`, `isTruncated`, `tokens` (first, end), `staleness`
    (largest), `ratio` (the one farthest from 1), `phi` (mean); None for what a demonstration, or its answer, lacks."""
    columns: dict[str, NDArray[Any]] = field(default_factory=dict[str, NDArray[Any]])
    """`tokens` and `prompts` (places in `vocabulary`), `policy`, `behavior` (log-probs), `versions`."""
    vocabulary: list[bytes] = field(default_factory=list[bytes])
    num_left_out: int = 0
    """Answers that the page has no room for."""


def gather(runs: Sequence[Run], *, max_tokens: int) -> Records:
    """Read the excerpts of all runs. Every file that cannot be read becomes a note of its run."""
    tables = [(r, table) for r, run in enumerate(runs) for table in _read(run)]
    kept = _spread(tables, max_tokens)
    records = Records(num_left_out=sum(len(table) for _, table in tables) - sum(len(table) for _, table in kept))
    tokens, prompts, others = list[Any](), list[Any](), {"policy": list[Any](), "behavior": [], "versions": []}
    vocabularies = [Pieces(tokenizer_folder(run)) for run in runs]
    for run, pieces in zip(runs, vocabularies, strict=True):
        if not pieces.has_text and ExcerptFolder(run.run_dir.excerpts).files():
            run.notes.append(f"no {run.setting('model', 'path')}/tokenizer.json here: tokens are shown as numbers")
    places: dict[tuple[int, int], int] = {}
    end = prompts_end = 0
    for r, table in kept:
        for row in _rows(table):
            group = _group(r, row)
            if not (records.groups and group.items() <= records.groups[-1].items()):
                prompts.append(_placed(row["prompt"], r, places))
                records.groups.append({**group, "prompt": [prompts_end, prompts_end + len(row["prompt"])]})
                prompts_end = records.groups[-1]["prompt"][1]
            tokens.append(_placed(row["tokens"], r, places))
            for name, values in _numbers(row).items():
                others[name].append(values)
            records.answers.append(_answer(row, group=len(records.groups) - 1, start=end))
            end += len(row["tokens"])
    kinds = {"tokens": np.uint32, "prompts": np.uint32, "policy": np.int16, "behavior": np.int16, "versions": np.int32}
    for name, parts in {"tokens": tokens, "prompts": prompts, **others}.items():
        records.columns[name] = np.concatenate([np.zeros(0), *parts]).astype(kinds[name])
    records.vocabulary = [vocabularies[r].bytes_of(token) for r, token in places]
    return records


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


def _placed(tokens: NDArray[Any], r: int, places: dict[tuple[int, int], int]) -> list[int]:
    """Places in the vocabulary of the page, which grows by tokens that are new to it."""
    return [places.setdefault((r, token), len(places)) for token in tokens.tolist()]


def _numbers(row: dict[str, Any]) -> dict[str, NDArray[Any]]:
    count = len(row["tokens"])
    versions = row["versions"] if row["versions"] is not None else np.full(count, -1)
    return {
        "policy": _thousandths(row["policy_logprobs"], count),
        "behavior": _thousandths(row["behavior_logprobs"], count),
        "versions": versions,
    }


def _thousandths(logprobs: NDArray[np.float32] | None, count: int) -> NDArray[Any]:
    if logprobs is None:
        return np.full(count, NOTHING)
    rounded = np.clip(np.rint(np.nan_to_num(logprobs) * PER_NAT), NOTHING + 1, 0)
    return np.where(np.isfinite(logprobs), rounded, NOTHING)


def _answer(row: dict[str, Any], *, group: int, start: int) -> dict[str, Any]:
    answer = {
        "group": group,
        "number": row["trajectory"] or 0,
        "reward": _short(row["reward"]),
        "advantage": _short(row["advantage"]),
        "isTruncated": bool(row["is_truncated"]),
        "tokens": [start, start + len(row["tokens"])],
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
