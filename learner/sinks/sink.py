"""A sink, and the points that it is given: lines of metrics.jsonl and eval.jsonl, as numbers on the axis of steps."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

AXIS = ("step", "time")


@dataclass(frozen=True)
class Point:
    """What is known of one moment of a run."""

    series: str
    """`train`, or `eval/TASK`."""
    step: int
    """Optimizer steps completed: the axis."""
    time: float
    """Seconds since 1970."""
    values: dict[str, float]
    """By the name of the line's field; of a table in the line by FIELD/KEY."""


class Sink(Protocol):
    """May raise whatever it likes, and take its time: see Feed."""

    def add(self, point: Point) -> None:
        """Show one more."""
        ...

    def close(self) -> None:
        """Show all that was added."""
        ...


def step_point(record: Mapping[str, Any]) -> Point:
    """Of a line of metrics.jsonl; its tables are left out, as their keys are actors, which come and go."""
    plain = {name: value for name, value in record.items() if not isinstance(value, dict)}
    return Point("train", record["step"], record.get("time", time.time()), numbers(plain))


def evaluation_point(line: Mapping[str, Any]) -> Point:
    """Of a line of eval.jsonl."""
    values = numbers(line)
    if interval := line.get("confidence_95"):
        values |= {"confidence_95/low": interval[0], "confidence_95/high": interval[1]}
    return Point(f"eval/{line['task']}", line["step"], line.get("time", time.time()), values)


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """All numbers of a line but its place on the axis."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            found |= {f"{name}/{key}": number for key, number in numbers(value).items()}
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name not in AXIS:
            found[name] = value
    return found
