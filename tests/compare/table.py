"""README's part on the comparison: how far it got, a table of methods and one of lags, written between two markers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- compare: made by `make compare` from here -->", "<!-- compare: to here -->"
FIGURE = "deploy/figures/compare.svg"
NOTHING = "–"
Row = Mapping[str, Any]


def write_table(readme: Path, outcome: Mapping[str, Any]) -> None:
    """Replace what stands between the markers. Raises ValueError where they are missing."""
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme}: got no pair of markers, expected {BEGIN!r} and {END!r} once each")
    before, _, rest = text.partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{render(outcome)}\n{END}{rest.partition(END)[2]}")


def render(outcome: Mapping[str, Any]) -> str:
    parts = [how_far(outcome)]
    if outcome["methods"]:
        parts.append(methods_table(outcome["methods"]))
    if outcome["staleness"]:
        parts.append(staleness_table(outcome["staleness"], bar=outcome["bar"]["reward"]))
    if outcome["methods"]:
        parts.append(f"![Comparison of methods]({FIGURE})")
    return "\n\n".join(parts)


def how_far(outcome: Mapping[str, Any]) -> str:
    done, num = outcome["num_done"], outcome["num_runs"]
    if not done:
        return f"None of its {num} runs has been taken yet."
    words = f"{done} of {num} runs, {outcome['hours']:.1f} hours, on {' and '.join(outcome['machines'])}."
    if outcome["failed"]:
        words += f" Failed, and counted as such: {', '.join(outcome['failed'])}."
    if outcome["missing"]:
        words += f" Not taken yet: {num - done}, named in `tests/compare/compare.json`."
    return words


def methods_table(rows: Sequence[Row]) -> str:
    heads = (
        "method", "seeds", "learning rate", "held-out accuracy", "against GRPO", "retention", "answer tokens",
        "entropy", "expert rows", "answers", "tokens sampled", "minutes",
    )  # fmt: skip
    return _table(heads, [_method_cells(row) for row in rows])


def _method_cells(row: Row) -> list[str]:
    budget, wall_s = row["budget"], row["wall_s"]
    rate = ", ".join(f"{lr:g}" for lr in row["lr"]) or NOTHING
    return [
        f"`{row['label']}`" if row["lr"] else "untrained",
        _seeds(row),
        rate + (f" (of {row['rates_tried']})" if row["lr"] else ""),
        _number(row["accuracy"]),
        _difference(row["against"]),
        _number(row["retention"]),
        _number(row["answer_tokens"], digits=1),
        _number(row["entropy"], digits=2),
        _count(budget.get("expert_rows")),
        _count(budget.get("answers")),
        _count(budget.get("tokens_sampled")),
        f"{wall_s['run'] / 60:.1f}" if budget and wall_s else NOTHING,
    ]


def staleness_table(rows: Sequence[Row], *, bar: float) -> str:
    heads = ("lag", "correction", "seeds", "staleness", "reward", "against no lag", f"within ±{bar:g}", "entropy")
    return _table(heads, [_staleness_cells(row) for row in rows])


def _staleness_cells(row: Row) -> list[str]:
    mean, most = row["staleness_mean"], row["staleness_max"]
    return [
        str(row["lag"]),
        f"`{row['correction']}`",
        _seeds(row),
        f"{mean['mean']:.2f} (max {most})" if mean else NOTHING,
        _number(row["reward"]),
        _difference(row["against"]),
        {True: "yes", False: "no", None: ""}[row["is_within_bar"]],
        _number(row["entropy"], digits=2),
    ]


def _seeds(row: Row) -> str:
    failed = len(row["failed_seeds"])
    return f"{row['num_seeds']}" + (f", {failed} failed" if failed else "")


def _number(interval: Row | None, *, digits: int = 3) -> str:
    if interval is None:
        return NOTHING
    half = interval["half_width"]
    return f"{interval['mean']:.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


def _difference(interval: Row | None) -> str:
    """What is over the problems of one seed only has a star."""
    if interval is None:
        return NOTHING
    return f"{interval['mean']:+.3f} ± {interval['half_width']:.3f}" + ("*" if interval["over"] == "problems" else "")


def _count(value: float | None) -> str:
    return f"{value:,.0f}" if value else NOTHING


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
