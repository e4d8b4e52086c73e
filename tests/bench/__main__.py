"""`make bench`: every hot path against what a user would pick instead, and against its limit, in one run."""

import json
import os
import platform
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console

from tests.bench.figure import Figure, print_figures

PARTS = ("learner", "trajectories", "weights", "async", "scale")
MODULES = {"async": "asynchrony"}
"""Of tests.bench, where the part's name is a word of Python's."""

Say = Callable[[str], None]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    parts: Annotated[list[str] | None, typer.Argument(help=f"which parts: {', '.join(PARTS)}; none: all")] = None,
    out: Annotated[Path, typer.Option(help="results of each part are written here as they come")] = Path("bench.json"),
) -> None:
    """Measure, print a table for each part, and keep the figures of parts that are not measured this time."""
    unknown = [part for part in parts or () if part not in PARTS]
    if unknown:
        raise typer.BadParameter(f"got {', '.join(unknown)}, expected some of {', '.join(PARTS)}")
    console, started = Console(width=max(Console().width, 140)), time.monotonic()
    for part in parts or PARTS:
        console.print(f"[bold]{part}[/]: measuring")
        began = time.monotonic()

        def say(line: str, part: str = part) -> None:
            console.print(f"  {(time.monotonic() - started) / 60:5.1f} min  {part}: {line}", highlight=False)

        module = import_module(f"tests.bench.{MODULES.get(part, part)}")
        figures: list[Figure] = module.measure(say)
        print_figures(part, figures, console)
        write_part(out, part, figures, seconds=time.monotonic() - began)
    console.print(f"written to {out}")


def write_part(out: Path, part: str, figures: list[Figure], *, seconds: float) -> None:
    found = json.loads(out.read_text()) if out.exists() else {}
    found[part] = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "wall_s": round(seconds, 1),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "load_before": os.getloadavg(),
        },
        "figures": [figure.line() for figure in figures],
    }
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    app()
