"""README's part on the comparison: how far it got, a table of methods and one of lags, written between two markers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.compare.outcome import AGAINST

BEGIN, END = "<!-- compare: made by `make compare` from here -->", "<!-- compare: to here -->"
FIGURE = "deploy/figures/compare.svg"
NOTHING = "–"
TRIES = "Every learning rate that was tried, at the first seed; in bold the one that validation chose:"
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
        parts += [methods_table(outcome["methods"]), budgets_table(outcome["methods"])]
        if any(row["tries"] for row in outcome["methods"]):
            parts += [TRIES, tries_table(outcome["methods"])]
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
        words += f" Failed twice, and in no mean: {', '.join(outcome['failed'])}."
    if outcome["failed_once"]:
        words += f" Failed once and taken again: {', '.join(outcome['failed_once'])}."
    if outcome["missing"]:
        words += f" Not taken yet: {num - done}, named in `tests/compare/compare.json`."
    return words


def methods_table(rows: Sequence[Row]) -> str:
    heads = (
        "method", "seeds", "learning rate", "held-out accuracy", "− SFT", "− GRPO", "− SFT-then-RL", "retention",
        "answer tokens", "entropy",
    )  # fmt: skip
    return _table(heads, [_method_cells(row) for row in rows])


def _method_cells(row: Row) -> list[str]:
    rate = ", ".join(f"{lr:g}" for lr in row["lr"]) or NOTHING
    return [
        _method(row),
        _seeds(row),
        rate + (f" (of {len(row['tries'])})" if row["lr"] else ""),
        _number(row["accuracy"]),
        *(_difference(row["against"].get(other)) for other in AGAINST),
        _number(row["retention"]),
        _number(row["answer_tokens"], digits=1),
        _number(row["entropy"], digits=2),
    ]


def budgets_table(rows: Sequence[Row]) -> str:
    """Of a run on average."""
    heads = (
        "method", "optimizer steps", "expert rows", "answers", "tokens sampled", "expert tokens trained",
        "policy tokens trained", "minutes",
    )  # fmt: skip
    return _table(heads, [_budget_cells(row) for row in rows if row["budget"]])


def _budget_cells(row: Row) -> list[str]:
    counted = ("steps", "expert_rows", "answers", "tokens_sampled", "expert_tokens", "policy_tokens")
    return [_method(row), *(_count(row["budget"].get(key)) for key in counted), f"{row['wall_s']['run'] / 60:.1f}"]


def tries_table(rows: Sequence[Row]) -> str:
    """Every learning rate that was tried, and in bold the one that was taken."""
    heads = ("method", "learning rate", "validation", "held-out accuracy", "retention")
    return _table(heads, [_try_cells(row, one) for row in rows for one in row["tries"]])


def _try_cells(row: Row, one: Row) -> list[str]:
    rate, figures = f"{one['lr']:g}", (one["validation"], one["accuracy"], one["retention"])
    return [
        _method(row),
        f"**{rate}**" if one["is_best"] else rate + (", failed" if one["failure"] else ""),
        *(NOTHING if figure is None else f"{figure:.3f}" for figure in figures),
    ]


def _method(row: Row) -> str:
    return f"`{row['label']}`" if row["lr"] else "untrained"


def staleness_table(rows: Sequence[Row], *, bar: float) -> str:
    heads = (
        "lag", "correction", "seeds", "staleness", "won by sampling", "reward", "− no lag", f"within ±{bar:g}",
        "entropy",
    )  # fmt: skip
    return _table(heads, [_staleness_cells(row) for row in rows])


def _staleness_cells(row: Row) -> list[str]:
    mean, most = row["staleness_mean"], row["staleness_max"]
    return [
        str(row["lag"]),
        f"`{row['correction']}`",
        _seeds(row),
        f"{mean['mean']:.2f} (max {most})" if mean else NOTHING,
        _number(row["gain"]),
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
