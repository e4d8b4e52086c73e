"""Questions and demonstrations of the comparison as JSON lines, made anew wherever it is run: equal seeds, equal bytes.

No question is in two of them: it is held out by a hash of its text, one stream of held-out questions is dealt out to
validation and test of one seed after another, and prompts leave the expert's questions out. Seeds share no held-out
question, so that the spread between them holds the chance of problems, too.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import typer

from common.problems import Problem, ReasoningProblems, Split, first_item
from tests.compare.task import TRAINED, Family

EXPERT_SEED = 7_000_003
HELD_OUT_SEED = 7_000_004
NUM_PROMPTS = 1500
"""Of one seed: more than a run asks for."""


def main(folder: Path, seed: int, num_expert_rows: int, num_validation: int, num_test: int) -> None:
    """Write the tables of the runs with this seed into FOLDER."""
    write_tables(folder, seed, num_expert_rows=num_expert_rows, num_validation=num_validation, num_test=num_test)


def write_tables(folder: Path, seed: int, *, num_expert_rows: int, num_validation: int, num_test: int) -> None:
    """demonstrations.jsonl, and of this seed the tables of prompts, validation and test."""
    experts = list(islice(stream(TRAINED, "train", EXPERT_SEED), num_expert_rows))
    taken = {problem.question for problem in experts}
    prompts = (problem for problem in stream(TRAINED, "train", first_item(seed)) if problem.question not in taken)
    num = num_validation + num_test
    held_out = list(islice(stream(TRAINED, "held_out", HELD_OUT_SEED), seed * num, (seed + 1) * num))
    if len(held_out) < num:
        raise ValueError(f"{TRAINED.name}: got {len(held_out)} held-out questions for seed {seed}, expected {num}")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "demonstrations.jsonl", map(demonstration, experts))
    _write(table(folder, "prompts", seed), map(question, islice(prompts, NUM_PROMPTS)))
    _write(table(folder, "validation", seed), map(question, held_out[:num_validation]))
    _write(table(folder, "test", seed), map(question, held_out[num_validation:]))


def write_family(folder: Path, family: Family, seed: int, *, num: int) -> Path:
    """The problems by which retention is measured, of both splits as nobody trains on either; as many as there are
    where these are fewer."""
    path = table(folder, family.name, seed)
    problems = chain(*(stream(family, split, first_item(seed)) for split in ("train", "held_out")))
    _write(path, map(question, islice(problems, num)))
    return path


def table(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name}-seed{seed}.jsonl"


def stream(family: Family, split: Split, seed: int) -> Iterator[Problem]:
    """Different problems, in an order of the seed's own."""
    return ReasoningProblems(family=family.name, seed=seed, **family.parameters).distinct(split)


def question(problem: Problem) -> dict[str, Any]:
    """A row that the environment `math` reads."""
    return {"question": problem.question, "answer": problem.answer}


def demonstration(problem: Problem) -> dict[str, Any]:
    """A row of `chord-expert import jsonl`. Raises ValueError where the solution is wrong."""
    solution, result = worked_solution(problem.entry["metadata"]["expression"])
    if str(result) != problem.answer:
        raise ValueError(f"{problem.question}: got {result}, expected {problem.answer}")
    return {"prompt": problem.question, "response": solution}


def worked_solution(expression: str) -> tuple[str, int]:
    """The expert's answer, tens before ones, an operation a line; and its result."""
    first, sign, second = expression.split()
    total, lines = int(first), list[str]()
    for part in filter(None, (int(second) // 10 * 10, int(second) % 10)):
        result = total + part if sign == "+" else total - part
        lines.append(f"{total} {sign} {part} = {result}")
        total = result
    return "\n".join([*lines, f"The answer is {total}."]), total


def task_hash(num_expert_rows: int) -> str:
    """Equal exactly where demonstrations, and the questions of a seed, are."""
    whole = [TRAINED.name, TRAINED.parameters, EXPERT_SEED, HELD_OUT_SEED, NUM_PROMPTS, num_expert_rows]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:8]


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    typer.run(main)
