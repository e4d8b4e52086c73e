"""`chord-expert import openr1-math`: the real command on files in the layout that is published."""

import json
import os
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
from common.tables import read_table
from learner.expert.openr1 import choose, expert_rows, integer_of
from learner.expert.selection import Asked, Candidate, Once, select, shortfalls
from learner.expert.store import ExpertRow, ExpertStore, NewRow

GOLDEN = [[16, 27, 18], [1, 23, 19, 3], [12, 25]]
"""Positions of experts, prompts and held-out problems of 30 at seed 0."""
TEMPLATE = "{question}\n\nPut your answer within \\boxed{}."
PUBLISHED = pa.schema(
    [
        *[(name, pa.string()) for name in ("problem", "solution", "answer", "problem_type", "question_type", "source")],
        ("uuid", pa.string()),
        ("is_reasoning_complete", pa.list_(pa.bool_())),
        ("generations", pa.list_(pa.string())),
        ("correctness_math_verify", pa.list_(pa.bool_())),
        ("correctness_llama", pa.list_(pa.bool_())),
        ("finish_reasons", pa.list_(pa.string())),
        ("correctness_count", pa.int64()),
        ("messages", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
    ]
)


def problem(number: int | str, **columns: Any) -> dict[str, Any]:
    """A published row; two generations, both verified, unless told otherwise."""
    text = f"What is {number} plus 0?"
    generations = [f"<think>{number} it is.</think>\\boxed{{{number}}}", f"<think>Hm.</think>\\boxed{{{number}}}"]
    row: dict[str, Any] = {
        "problem": text, "solution": "Add.", "answer": str(number), "problem_type": "Algebra",
        "question_type": "math-word-problem", "source": "olympiads", "uuid": f"uuid-{number}",
        "is_reasoning_complete": [True, True], "generations": generations, "correctness_math_verify": [True, True],
        "correctness_llama": None, "finish_reasons": None, "correctness_count": 2,
        "messages": [{"content": text, "role": "user"}, {"content": generations[0], "role": "assistant"}],
    }  # fmt: skip
    return row | columns


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    parquet.write_table(pa.Table.from_pylist(list(rows), schema=PUBLISHED), path)  # pyright: ignore
    return path


def write_config(folder: Path, model: Path, *, template: str = TEMPLATE) -> Path:
    path = folder / "recipe.toml"
    path.write_text(
        f"""
[run]
dir = {json.dumps(str(folder / "run"))}
[model]
path = {json.dumps(str(model))}
[sampling]
max_tokens = 64
[environment]
name = "math"
[environment.options]
source = {json.dumps(str(folder / "new" / "prompts.jsonl"))}
system_prompt = "Think."
prompt_template = {json.dumps(template)}
"""
    )
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "learner.expert", "import", "openr1-math", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def stored(folder: Path) -> list[ExpertRow]:
    with closing(ExpertStore(folder / "run" / "expert.sqlite")) as store:
        return list(store.rows())


def asked_in(row: ExpertRow | NewRow) -> str:
    """The question of an expert row."""
    return row.messages[-2].content.removesuffix(TEMPLATE.removeprefix("{question}"))


def prompts(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def chosen_of(
    folder: Path, model: Path, rows: Sequence[dict[str, Any]], *, max_tokens: int = 200, overrides: Sequence[str] = ()
) -> tuple[list[NewRow], dict[str, int]]:
    """Every training question as an expert row, and the funnel."""
    source = str(write_parquet(folder / "source.parquet", rows))
    config = resolve_config(write_config(folder, model), overrides).config
    asked = Asked(num_rows=1000, num_prompts=0, num_held_out=0)
    selection, funnel = choose(config, lambda: read_table(source), asked=asked, max_tokens=max_tokens)
    counts = {line[11:]: int(line[:10].replace(",", "")) for line in funnel.lines()}
    return list(expert_rows(config, lambda: read_table(source), selection)), counts


def training(number: int) -> list[int]:
    """The first numbers whose problems are not held out."""
    return [n for n in range(1000) if split_of(problem(n)["problem"]) == "train"][:number]


@pytest.fixture(scope="module")
def imported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of an import of 20 rows and 40 prompts out of 120 problems, and what was said."""
    folder = tmp_path_factory.mktemp("imported")
    source = write_parquet(folder / "source.parquet", [problem(n) for n in range(120)])
    done = run(source, "--config", write_config(folder, tiny_model), "--num-rows", 20, "--num-prompts", 40)
    assert (done.returncode, done.stderr) == (0, "")
    return folder, done.stdout


def test_the_command_says_how_many_came_how_far_and_what_there_is_too_little_of(imported: tuple[Path, str]) -> None:
    folder, said = imported
    num_held_out = sum(split_of(problem(n)["problem"]) == "held_out" for n in range(120))
    file, store = folder / "new" / "prompts.jsonl", folder / "run" / "expert.sqlite"
    assert said.splitlines() == [
        "       120 problems read",
        "       120 with two or more generations",
        "       120 whose answer is an integer",
        "       120 with a generation that is verified and complete",
        "       120 not taken already",
        "       120 whose prompt leaves room for an answer",
        "       120 with such a generation that is short enough",
        f"asked for 512 held-out problems, found only {num_held_out}",
        f"wrote 40 prompts and {num_held_out} held-out problems to {file}",
        f"imported 20 rows into {store} (0 duplicates, 0 bad rows skipped)",
    ]


def test_expert_rows_prompts_and_held_out_problems_are_disjoint_as_the_environment_sees_them(
    imported: tuple[Path, str],
) -> None:
    folder, _ = imported
    options = resolve_config(folder / "recipe.toml", ()).config.environment.options
    environment: Any = make_environment("math", seed=0, options=options)
    records = prompts(folder / "new" / "prompts.jsonl")
    num_held_out = sum(split_of(record["question"]) == "held_out" for record in records)
    train = {environment.task("train", index)[0].question for index in range(100)}
    held_out = {environment.task("held_out", index)[0].question for index in range(num_held_out)}
    experts = {asked_in(row) for row in stored(folder)}
    assert (len(experts), len(train), len(held_out)) == (20, 40, num_held_out)
    assert not experts & train
    assert not experts & held_out
    assert not train & held_out
    assert train | held_out == {record["question"] for record in records}
    assert all(split_of(question) == "train" for question in experts)


def test_an_expert_row_answers_the_very_prompt_that_the_environment_sets(imported: tuple[Path, str]) -> None:
    folder, _ = imported
    options = resolve_config(folder / "recipe.toml", ()).config.environment.options
    environment: Any = make_environment("math", seed=0, options=options)
    task, messages = environment.task("train", 0)
    row = stored(folder)[0]
    assert [(m.role, m.content.replace(asked_in(row), task.question)) for m in row.messages[:-1]] == [
        (m.role, m.content) for m in messages
    ]
    number = asked_in(row).split()[2]
    assert row.messages[-1].content == problem(number)["generations"][0]
    assert row.source == "open-r1/OpenR1-Math-220k"


def test_a_line_of_the_prompts_file_has_question_answer_and_uuid(imported: tuple[Path, str]) -> None:
    record = prompts(imported[0] / "new" / "prompts.jsonl")[0]
    number = record["question"].split()[2]
    assert record == {"question": problem(number)["problem"], "answer": number, "uuid": f"uuid-{number}"}


def test_the_same_import_again_changes_nothing_and_another_seed_never_makes_an_expert_row_a_prompt(
    imported: tuple[Path, str],
) -> None:
    folder, _ = imported
    arguments = [folder / "source.parquet", "--config", folder / "recipe.toml", "--num-rows", 20, "--num-prompts", 40]
    before, file = stored(folder), folder / "new" / "prompts.jsonl"
    written = file.read_bytes()
    again = run(*arguments)
    assert "imported 0 rows" in again.stdout
    assert "(20 duplicates" in again.stdout
    assert (stored(folder), file.read_bytes()) == (before, written)
    other_file = folder / "other.jsonl"
    other = run(*arguments, "--prompts", other_file, "run.seed=1")
    assert other.returncode == 0, other.stderr
    experts = {asked_in(row) for row in stored(folder)}
    assert len(experts) > 20
    assert not experts & {record["question"] for record in prompts(other_file)}
    assert file.read_bytes() == written


def test_only_verified_complete_generations_of_integer_problems_count(tiny_model: Path, tmp_path: Path) -> None:
    a, b, c, d, e, f, g, h = training(8)
    rows, counts = chosen_of(
        tmp_path, tiny_model,
        [
            problem(a),
            problem(b, generations=["only one"], correctness_math_verify=[True], is_reasoning_complete=[True]),
            problem(c, answer="\\frac{1}{2}"),
            problem(d, correctness_math_verify=[False, True]),
            problem(e, is_reasoning_complete=[False, False]),
            problem(f, correctness_math_verify=[True, False], is_reasoning_complete=[False, True]),
            problem(g, correctness_math_verify=None),
            problem(h, answer=None),
        ],
    )  # fmt: skip
    assert list(counts.values()) == [8, 7, 5, 2, 2, 2, 2]
    assert [(asked_in(row), row.messages[-1].content) for row in rows] == [
        (problem(a)["problem"], problem(a)["generations"][0]),
        (problem(d)["problem"], problem(d)["generations"][1]),
    ]


def test_the_first_short_enough_generation_is_taken_by_the_models_own_tokens(tiny_model: Path, tmp_path: Path) -> None:
    a, b, c = training(3)  # the tokenizer has a token for every byte; the end of the turn is one more
    fits, too_long = "\u221a" * 33, "\u221a" * 33 + "1"
    rows, counts = chosen_of(
        tmp_path, tiny_model,
        [
            problem(a, generations=[too_long, fits]),
            problem(b, generations=[fits, too_long]),
            problem(c, generations=[too_long, too_long]),
        ],
        max_tokens=100,
    )  # fmt: skip
    assert [row.messages[-1].content for row in rows] == [fits, fits]
    assert list(counts.values())[-2:] == [3, 2]


def test_a_problem_that_comes_twice_is_taken_once(tiny_model: Path, tmp_path: Path) -> None:
    a, b = training(2)
    twin = problem(a, problem=problem(a)["problem"].upper().replace(" ", "  ") + "\n", uuid="twin")
    rows, counts = chosen_of(tmp_path, tiny_model, [problem(a), twin, problem(b), problem(a)])
    assert [asked_in(row) for row in rows] == [problem(a)["problem"], problem(b)["problem"]]
    assert counts["not taken already"] == 2


def test_a_twin_is_taken_where_the_first_does_not_qualify(tiny_model: Path, tmp_path: Path) -> None:
    (a,) = training(1)
    rows, _ = chosen_of(tmp_path, tiny_model, [problem(a, generations=["x" * 300] * 2), problem(a)])
    assert [row.messages[-1].content for row in rows] == [problem(a)["generations"][0]]


def test_a_prompt_that_leaves_no_room_for_an_answer_is_left_out(tiny_model: Path, tmp_path: Path) -> None:
    a, b = training(2)
    rows, counts = chosen_of(
        tmp_path, tiny_model, [problem(a), problem(b, problem="x" * 400)],
        overrides=["actor.max_model_tokens=300"],
    )  # fmt: skip
    assert [asked_in(row) for row in rows] == [problem(a)["problem"]]
    assert counts["whose prompt leaves room for an answer"] == 1


@pytest.mark.parametrize(
    ("answer", "integer"),
    [
        ("72", "72"), (" -3 ", "-3"), ("+5", "5"), ("007", "7"), ("$1,234$", "1234"), ("\\boxed{12}", "12"),
        ("$\\boxed{ 12 }$", "12"), ("\\(8\\)", "8"), ("\\[ 8 \\]", "8"), ("1{,}000{,}000", "1000000"), ("− 4", "-4"),
        ("1\\,000", "1000"), ("1,\\!000", "1000"), ("12 345", "12345"), ("-0", "0"),
        ("", None), ("12.0", None), ("6/2", None), ("\\frac{4}{2}", None), ("180^\\circ", None), ("A", None),
        ("1,23", None), ("1,2", None), ("12345,678", None), ("x = 3", None), ("2, 3", None), ("2 3", None),
        ("10^{6}", None), ("٣", None), ("--3", None), ("$", None), ("\\boxed{}", None), ("9" * 101, None),
        ("5 \\text{ cm}", None), ("50\\%", None), ("100, 200", None), ("100 2000", None),
    ],
)  # fmt: skip
def test_what_is_an_integer(answer: str, integer: str | None) -> None:
    assert integer_of(answer) == integer


def test_fewer_than_asked_is_said_and_none_at_all_is_an_error_that_writes_nothing(
    tiny_model: Path, tmp_path: Path
) -> None:
    config, (a, b) = write_config(tmp_path, tiny_model), training(2)
    few = run(write_parquet(tmp_path / "few.parquet", [problem(a), problem(b)]), "-c", config, "--num-rows", 1)
    assert few.returncode == 0, few.stderr
    assert "asked for 20,000 prompts, found only 1\n" in few.stdout
    (tmp_path / "new" / "prompts.jsonl").unlink()
    none = run(write_parquet(tmp_path / "none.parquet", [problem(a, answer="x")]), "-c", config, "--num-prompts", 0)
    assert (none.returncode, none.stderr) == (
        2, "chord-expert: expert rows: got none that qualifies, expected 5,000 (see the counts above)\n",
    )  # fmt: skip
    assert "         1 with two or more generations\n         0 whose answer is an integer\n" in none.stdout
    assert not (tmp_path / "new" / "prompts.jsonl").exists()
    assert len(stored(tmp_path)) == 1


def test_a_table_without_the_published_columns_is_refused_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.jsonl"
    source.write_text(json.dumps({"problem": "1 + 1?", "answer": "2", "uuid": "u"}) + "\n")
    done = run(source, "--config", write_config(tmp_path, tiny_model))
    assert (done.returncode, done.stderr) == (
        2,
        f"chord-expert: {source}:1: got columns problem, answer, uuid, expected also generations, "
        "correctness_math_verify, is_reasoning_complete (see open-r1/OpenR1-Math-220k)\n",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.toml", "source.jsonl"]


def test_a_configuration_that_does_not_fit_is_told_before_anything_is_read(tmp_path: Path) -> None:
    gone = tmp_path / "gone.jsonl"
    config = write_config(tmp_path, tmp_path / "no-model")

    def mistake(*arguments: object) -> str:
        done = run(gone, "--config", config, *arguments)
        assert done.returncode == 2
        return done.stderr

    assert "model.path: got" in mistake()
    assert 'environment.name: got "reasoning_gym", expected "math"' in mistake("environment.name=reasoning_gym")
    assert "got 'new.txt', expected a FILE.jsonl other than the source" in mistake("--prompts", "new.txt")
    assert "expected a FILE.jsonl other than the source" in mistake("--prompts", gone)
    assert f"SOURCE: got {gone}, another, expected one" in mistake("another")


def test_expert_rows_need_the_template_that_prompts_have(tiny_model: Path, tmp_path: Path) -> None:
    config = resolve_config(write_config(tmp_path, tiny_model, template="Answer!"), ()).config
    with pytest.raises(ConfigError, match=r"prompt_template: got 'Answer!', expected text with {question}"):
        choose(config, list, asked=Asked(1, 1, 1), max_tokens=10)


def test_a_prompts_file_that_cannot_be_written_is_one_line_and_imports_nothing(
    tiny_model: Path, tmp_path: Path
) -> None:
    source = write_parquet(tmp_path / "source.parquet", [problem(n) for n in range(9)])
    (tmp_path / "file").write_text("")
    wanted = ["--num-rows", 2, "--num-prompts", 2, "--prompts", tmp_path / "file" / "p.jsonl"]
    done = run(source, "--config", write_config(tmp_path, tiny_model), *wanted)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "p.jsonl: cannot be written (Not a directory)" in done.stderr
    assert not os.path.exists(tmp_path / "run" / "expert.sqlite")


def test_the_choice_is_the_same_on_every_machine() -> None:
    candidates = [Candidate(n, f"question {n}", {}) for n in range(30)]
    chosen = select(candidates, asked=Asked(3, 4, 2), seed=0, is_known=lambda _: False)
    groups = (chosen.experts, chosen.prompts, chosen.held_out)
    assert [[c.position for c in group] for group in groups] == GOLDEN
    others = select(candidates, asked=Asked(3, 4, 2), seed=1, is_known=lambda _: False)
    assert others != chosen


def test_nothing_to_choose_from_is_no_traceback() -> None:
    chosen = select([], asked=Asked(1, 0, 5), seed=0, is_known=lambda _: False)
    with pytest.raises(OperatorError, match="expert rows: got none that qualifies, expected 1"):
        list(shortfalls(chosen, Asked(1, 0, 5)))
    assert list(shortfalls(chosen, Asked(0, 0, 5))) == ["asked for 5 held-out problems, found only 0"]


def test_white_space_and_case_do_not_make_a_problem_new() -> None:
    once = Once()
    once.note("What is  1+1?")
    assert not once.is_new("what is 1 + 1?\n")
    assert once.is_new("what is 1 + 2?")
