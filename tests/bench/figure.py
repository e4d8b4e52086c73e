"""One measured figure: what we reach, what it is held against in the same run, and the bar."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Bar:
    """What the ratio of ours to the other's is held to; one of the two is set."""

    at_least: float | None = None
    at_most: float | None = None

    def is_met_by(self, ratio: float) -> bool:
        return (self.at_least is None or ratio >= self.at_least) and (self.at_most is None or ratio <= self.at_most)

    def __str__(self) -> str:
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"


@dataclass(frozen=True)
class Figure:
    """A line of the table; unit and conditions stand beside every number."""

    what: str
    """What was measured: "prompt 256, answers 64"."""
    unit: str
    """Of `ours` and `other`: "tokens/s", "bytes", "s"."""
    ours: float
    against: str = ""
    """What `other` is: a peer with its version ("TRL 1.16"), or a limit ("no commit"); empty: nothing to compare."""
    other: float | None = None
    bar: Bar | None = None
    """For `ratio`; None where none was set."""
    conditions: str = ""
    """What the number depends on: sizes, threads, repetitions and spread."""

    @property
    def ratio(self) -> float | None:
        """Ours by the other's; whether more is better depends on the unit."""
        return self.ours / self.other if self.other else None

    @property
    def is_met(self) -> bool | None:
        """None where there is no bar."""
        return None if self.bar is None or self.ratio is None else self.bar.is_met_by(self.ratio)

    def line(self) -> dict[str, Any]:
        """As in bench.json."""
        return {**asdict(self), "ratio": self.ratio, "bar": str(self.bar or ""), "is_met": self.is_met}


def print_figures(part: str, figures: list[Figure], console: Console) -> None:
    table = Table(title=part, title_justify="left", title_style="bold", show_edge=False)
    for name in ("what", "ours", "against", "its", "ratio", "bar", "conditions"):
        table.add_column(name, justify="right" if name in ("ours", "its", "ratio", "bar") else "left")
    for figure in figures:
        colour = {None: "", True: "green", False: "red"}[figure.is_met]
        ratio = "" if figure.ratio is None else f"{figure.ratio:.3g}"
        table.add_row(
            figure.what,
            f"{figure.ours:.4g} {figure.unit}",
            figure.against,
            "" if figure.other is None else f"{figure.other:.4g}",
            f"[{colour}]{ratio}[/]" if colour else ratio,
            str(figure.bar or ""),
            figure.conditions,
        )
    console.print(table)
    console.print()
