"""`chord-expert import toolace`: the real command on rows in the layout that is published."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from actors.environment import make_environment
from common.config.load import resolve_config
from common.errors import ConfigError, OperatorError
from common.problems import split_of
from common.tables import TableRow
from learner.expert.selection import Asked
from learner.expert.store import ExpertStore
from learner.expert.toolace import choose

SYSTEM = 'You are given functions.\n[{"name": "Weather API"}]'
TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
PUBLISHED = pa.schema([("system", pa.string()), ("conversations", pa.list_(TURN))])


def call(number: int) -> str:
    return f'[Weather API(city="city {number}", days=3), News API(from="noon")]'


def conversation(*turns: str, system: str = SYSTEM) -> dict[str, Any]:
    """Turns as "speaker: value"."""
    pairs = [turn.partition(": ") for turn in turns]
    return {"system": system, "conversations": [{"from": speaker, "value": value} for speaker, _, value in pairs]}


def weather(number: int) -> dict[str, Any]:
    return conversation(f"user: How is city {number}?", f"assistant: {call(number)}")


def write_config(folder: Path, model: Path) -> Path:
    path = folder / "recipe.toml"
    options = f"source = {json.dumps(str(folder / 'prompts.jsonl'))}"
    sections = {
        "run": f"dir = {json.dumps(str(folder / 'run'))}",
        "model": f"path = {json.dumps(str(model))}",
        "sampling": "max_tokens = 64",
        "environment": 'name = "function_calling"',
        "environment.options": options,
    }
    path.write_text("".join(f"[{name}]\n{text}\n" for name, text in sections.items()))
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "learner.expert", "import", "toolace", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def counts_of(folder: Path, model: Path, rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[int]]:
    """Questions that qualify, and the funnel."""
    config = resolve_config(write_config(folder, model), ()).config
    table = [TableRow(f"row {number}", row) for number, row in enumerate(rows, start=1)]
    selection, funnel = choose(config, table, asked=Asked(1000, 0, 1000))
    chosen = sorted((*selection.experts, *selection.held_out), key=lambda candidate: candidate.position)
    return [candidate.question for candidate in chosen], [int(line[:10]) for line in funnel.lines()]


def test_expert_rows_prompts_and_held_out_questions_are_disjoint(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.parquet"
    parquet.write_table(pa.Table.from_pylist([weather(n) for n in range(80)], schema=PUBLISHED), source)  # pyright: ignore
    config = write_config(tmp_path, tiny_model)
    done = run(source, "--config", config, "--num-rows", 10, "--num-prompts", 20)
    assert (done.returncode, done.stderr) == (0, "")
    num_held_out = sum(split_of(f"How is city {n}?") == "held_out" for n in range(80))
    assert done.stdout.splitlines() == [
        "        80 conversations read",
        "        80 with one user turn, which the assistant answers",
        "        80 with function calls and nothing else",
        "        80 not taken already",
        "        80 whose prompt leaves room for an answer",
        f"asked for 512 held-out problems, found only {num_held_out}",
        f"wrote 20 prompts and {num_held_out} held-out problems to {tmp_path / 'prompts.jsonl'}",
        f"imported 10 rows into {tmp_path / 'run' / 'expert.sqlite'} (0 duplicates, 0 bad rows skipped)",
    ]
    with closing(ExpertStore(tmp_path / "run" / "expert.sqlite")) as store:
        rows = list(store.rows())
    options = resolve_config(config, ()).config.environment.options
    environment: Any = make_environment("function_calling", seed=0, options=options)
    experts = {row.messages[1].content for row in rows}
    train = {environment.task("train", index)[0].question for index in range(60)}
    held_out = {environment.task("held_out", index)[0].question for index in range(num_held_out)}
    assert (len(experts), len(train), len(held_out)) == (10, 20, num_held_out)
    assert not experts & train
    assert not experts & held_out
    assert not train & held_out
    task, messages = environment.task("train", 0)
    row = rows[0]
    assert [message.content for message in messages] == [SYSTEM, task.question]
    assert [(m.role, m.content) for m in row.messages[:2]] == [("system", SYSTEM), ("user", row.messages[1].content)]
    number = int(row.messages[1].content.rstrip("?").split()[-1])
    assert (row.messages[2].role, row.messages[2].content) == ("assistant", call(number))
    assert environment.judge(task, call(int(task.question.rstrip("?").split()[-1])), is_truncated=False).reward == 1.0


def test_single_turns_that_are_answered_by_calls_qualify_whatever_comes_after(tiny_model: Path, tmp_path: Path) -> None:
    questions, counts = counts_of(
        tmp_path, tiny_model,
        [
            conversation("user: one?", "assistant: [f(a=1)]"),
            conversation("user: two?", "assistant: [f(a=1)]", "tool: [{}]", "assistant: It is 1."),
            conversation("user: three?", "assistant: Which city?", "user: Rome.", "assistant: [f(a=1)]"),
            conversation("user: four?", "assistant: No function can do that."),
            conversation("user: five?", "assistant: [f(a=unknown)]"),
            conversation("user: six?", "assistant: [f(a=1)] should do."),
            conversation("assistant: [f(a=1)]", "user: seven?"),
            conversation("user: eight?"),
            conversation("user:  ONE? ", "assistant: [f(a=2)]"),
            conversation("user: nine? " + "x" * 2000, "assistant: [f(a=2)]"),
            conversation("user: ten?", "assistant: [f(a=1)]", system=""),
        ],
    )  # fmt: skip
    assert questions == ["one?", "two?", "ten?"]
    assert counts == [11, 8, 5, 4, 3]


@pytest.mark.parametrize(
    ("row", "mistake"),
    [
        ({"system": "s", "messages": []}, "got columns system, messages, expected also conversations"),
        ({"system": "s", "conversations": ["hello"]}, 'conversations: got "hello", expected {"from": …, "value": …}'),
        ({"system": 1, "conversations": weather(1)["conversations"]}, "system: got 1, expected text"),
        ({"system": "s", "conversations": None}, 'expected a value of "conversations"'),
    ],
)
def test_a_row_in_another_layout_is_refused_in_one_line(
    row: dict[str, Any], mistake: str, tiny_model: Path, tmp_path: Path
) -> None:
    config = resolve_config(write_config(tmp_path, tiny_model), ()).config
    with pytest.raises(OperatorError, match=f"^source.jsonl:2: .*{re.escape(mistake)}"):
        choose(config, [TableRow("source.jsonl:1", weather(0)), TableRow("source.jsonl:2", row)], asked=Asked(1, 1, 1))


def test_the_run_must_call_functions(tiny_model: Path, tmp_path: Path) -> None:
    config = resolve_config(write_config(tmp_path, tiny_model), ["environment.name=math"]).config
    with pytest.raises(ConfigError, match=r'environment\.name: got "math", expected "function_calling"'):
        choose(config, [], asked=Asked(1, 1, 1))
