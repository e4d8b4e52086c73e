"""The expert of the comparison: solved training problems, worked out step by step, as JSON lines."""

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from common.chat import ChatMessage
from common.problems import Problem, ReasoningProblems
from tests.compare.task import TRAINED

EXPERT_SEED = 7_000_003
"""Of the demonstrations: other problems than the prompts of any run's seed, but for chance."""


def worked_solution(problem: Problem) -> str:
    """The expert's answer: one operation a line, then the result."""
    first, *rest = problem.entry["metadata"]["expression"].split()
    total, lines = int(first), list[str]()
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {result}")
        total = result
    return "\n".join([*lines, f"#### {total}"])


def demonstrations(num: int) -> Iterator[dict[str, Any]]:
    """Solved training problems as rows of `chord-expert import jsonl`. Raises ValueError where a solution is wrong."""
    problems = ReasoningProblems(seed=EXPERT_SEED, **TRAINED.environment())
    for problem in islice(problems.distinct("train"), num):
        solution = worked_solution(problem)
        if (score := problems.score(problem, solution)) != 1.0:
            raise ValueError(f"{problem.question}: {solution!r} scores {score}, expected 1")
        turns = [*problem.messages, ChatMessage(role="assistant", content=solution)]
        yield {"messages": [turn.model_dump() for turn in turns]}


def task_hash(num: int) -> str:
    """Equal exactly where the demonstrations are."""
    return hashlib.sha256(json.dumps([TRAINED.environment(), EXPERT_SEED, num]).encode()).hexdigest()[:8]


def write_demonstrations(path: Path, num: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in demonstrations(num)))


def main(path: Path, num_rows: Annotated[int, typer.Option(min=1)] = 1000) -> None:
    """Write them, for `chord-expert import jsonl`."""
    write_demonstrations(path, num_rows)


if __name__ == "__main__":
    typer.run(main)
