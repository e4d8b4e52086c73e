"""Benchmarks in their published layouts, written here as they are published, scored by the real command."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from actors.evaluator.benchmarks import LAYOUTS, load_benchmark, split_of_source
from actors.evaluator.tasks import EvaluationTask, make_tasks
from common.config.evaluation import BenchmarkName
from common.config.load import resolve_config
from common.errors import ConfigError, OperatorError
from tests.runs import run_module

Rows = Sequence[Mapping[str, Any]]

AIMO_AMC: Rows = [
    {"id": 0, "problem": "What is $x+y$?", "answer": 142.0, "url": "https://amc/1"},
    {"id": 1, "problem": "How many digits?", "answer": 36.0, "url": "https://amc/2"},
]
AMC23: Rows = [{"id": 0, "question": "What is $x+y$?", "answer": "27.0", "url": "https://amc/1"}]
AIME_2024: Rows = [
    {"id": 60, "problem": "Find $n$.", "solution": r"So \boxed{204}.", "answer": "204", "url": "u", "year": "2024"},
    {"id": 61, "problem": "Find $m$.", "solution": r"So \boxed{025}.", "answer": "025", "url": "u", "year": "2024"},
]
MAXWELL_JIA: Rows = [{"ID": "2024-I-1", "Problem": "Find $n$.", "Solution": "By hand.", "Answer": 204}]
MATH_AI_AIME24: Rows = [{"id": 60, "problem": "Find $n$.", "solution": r"\boxed{204}", "url": "u"}]
MATH_AI_AIME25: Rows = [
    {"problem": "Find the sum of all bases.", "answer": "70", "id": "0"},
    {"problem": "Find the area.", "answer": "588", "id": "1"},
]
OPENCOMPASS: Rows = [{"question": "Find the sum of all bases.", "answer": "70"}]
YENTINGLIN: Rows = [
    {"id": 0, "problem": "Find it.", "answer": "70", "solution": "A proof.\nOf two lines.", "url": "u", "year": 2025}
]
MATH_500: Rows = [
    {"problem": "Simplify.", "solution": r"\boxed{\frac{1}{2}}", "answer": r"\frac{1}{2}", "subject": "Algebra",
     "level": 2, "unique_id": "test/algebra/1.json"},
    {"problem": "Convert.", "solution": "...", "answer": r"\left( 3, \frac{\pi}{2} \right)", "subject": "Precalculus",
     "level": 2, "unique_id": "test/precalculus/807.json"},
    {"problem": "Evaluate.", "solution": "...", "answer": "10", "subject": "Algebra", "level": 1,
     "unique_id": "test/algebra/2.json"},
]  # fmt: skip
GSM8K: Rows = [
    {"question": "Natalia sold clips?", "answer": "48/2 = <<48/2=24>>24\n48+24 = <<48+24=72>>72\n#### 72"},
    {"question": "How much money?", "answer": "A lot.\n#### 1,250"},
]
TEN = [f"option {number}" for number in range(10)]
MMLU_PRO: Rows = [
    {"question_id": 70, "question": "Which law?", "options": TEN, "answer": "I", "answer_index": 8, "cot_content": "",
     "category": "law", "src": "ori_mmlu-law"},
    {"question_id": 71, "question": "Which other law?", "options": [*TEN[:4], *["N/A"] * 6], "answer": "D",
     "answer_index": 3, "cot_content": "", "category": "law", "src": "ori_mmlu-law"},
    {"question_id": 72, "question": "Which art?", "options": ["N/A", *TEN[1:]], "answer": "J", "answer_index": 9,
     "cot_content": "", "category": "other", "src": "stemez"},
]  # fmt: skip
PUBLISHED: list[tuple[str, Rows, list[str]]] = [
    ("amc", AIMO_AMC, ["142", "36"]),
    ("amc", AMC23, ["27"]),
    ("aime24", AIME_2024, ["204", "025"]),
    ("aime24", MAXWELL_JIA, ["204"]),
    ("aime24", MATH_AI_AIME24, ["204"]),
    ("aime25", MATH_AI_AIME25, ["70", "588"]),
    ("aime25", OPENCOMPASS, ["70"]),
    ("aime25", YENTINGLIN, ["70"]),
    ("math500", MATH_500, [r"\frac{1}{2}", r"\left( 3, \frac{\pi}{2} \right)", "10"]),
    ("gsm8k", GSM8K, ["72", "1,250"]),
    ("mmlu_pro", MMLU_PRO, ["I", "D", "I"]),  # of the last one, padding stood before the answer
]


def write_jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: Rows) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    return path


def write_answers(path: Path, answers: Mapping[tuple[str, int], Sequence[str]]) -> Path:
    lines = [
        {"task": task, "problem": problem, "sample": sample, "text": text}
        for (task, problem), texts in answers.items()
        for sample, text in enumerate(texts)
    ]
    return write_jsonl(path, lines)


def evaluate(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command."""
    done = run_module("actors.evaluator", *map(str, arguments), check=False)
    return done.returncode, done.stdout, done.stderr


def tasks_of(*benchmarks: str, **more: object) -> Sequence[EvaluationTask]:
    keys = {"benchmarks": json.dumps(benchmarks), "held_out": "false", **more}
    return make_tasks(resolve_config(None, [f"eval.{key}={value}" for key, value in keys.items()]).config)


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
@pytest.mark.parametrize(("name", "rows", "golds"), PUBLISHED)
def test_every_published_layout_is_read(name: str, rows: Rows, golds: list[str], write: Any, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows.{'jsonl' if write is write_jsonl else 'parquet'}", rows)
    assert load_benchmark(name, str(path)).golds == golds


def test_files_in_all_six_layouts_get_the_numbers_that_were_worked_out_by_hand(tmp_path: Path) -> None:
    files = {
        "amc": write_jsonl(tmp_path / "amc.jsonl", AIMO_AMC),
        "aime24": write_parquet(tmp_path / "aime24.parquet", AIME_2024),
        "aime25": write_jsonl(tmp_path / "aime25.jsonl", MATH_AI_AIME25),
        "math500": write_jsonl(tmp_path / "math500.jsonl", MATH_500),
        "gsm8k": write_parquet(tmp_path / "gsm8k.parquet", GSM8K),
        "mmlu_pro": write_parquet(tmp_path / "mmlu_pro.parquet", MMLU_PRO),
    }
    answers = write_answers(
        tmp_path / "answers.jsonl",
        {
            # amc: 3 of 8 right; pass@2 of (1 of 4) is 1/2, of (2 of 4) is 5/6
            ("amc", 0): [r"\boxed{142}", r"\boxed{141}", "no idea", r"\boxed{36}"],
            ("amc", 1): [r"Thus \boxed{36}.", "The answer is 36.0.", r"\boxed{142}", ""],
            # aime24: 2 of 2, with and without the zero in front
            ("aime24", 0): [r"\boxed{204}"],
            ("aime24", 1): [r"\boxed{25}"],
            ("aime25", 0): [r"First \boxed{588}, no: \boxed{70}"],
            ("aime25", 1): [r"First \boxed{588}, no: \boxed{70}"],
            ("math500", 0): [r"\boxed{0.5}"],
            ("math500", 1): [r"\boxed{(3, \pi/2)}"],
            ("math500", 2): [r"\boxed{11}"],
            ("gsm8k", 0): ["She sold\n#### 72"],
            ("gsm8k", 1): [r"\boxed{1250}"],
            ("mmlu_pro", 0): ["The answer is (I)."],
            ("mmlu_pro", 1): ["The answer is (I)."],  # no option there has that letter
            ("mmlu_pro", 2): ["The answer is (I)."],
        },
    )
    scored = tmp_path / "samples.jsonl"
    benchmarks = [part for name, path in files.items() for part in ("--benchmark", f"{name}={path}")]
    code, output, errors = evaluate("--answers", answers, *benchmarks, "--json", "-", "--samples", scored)
    assert code == 0, errors
    found = {line["task"]: line for line in json.loads(output)["tasks"]}
    assert list(found) == list(files)
    assert {task: (line["num_correct"], line["accuracy"], line["num_unparsed"]) for task, line in found.items()} == {
        "amc": (3, 3 / 8, 2),
        "aime24": (2, 1.0, 0),
        "aime25": (1, 1 / 2, 0),
        "math500": (2, pytest.approx(2 / 3), 0),
        "gsm8k": (2, 1.0, 0),
        "mmlu_pro": (2, pytest.approx(2 / 3), 1),
    }
    assert found["amc"]["pass_at_k"] == pytest.approx({"1": 3 / 8, "2": (1 / 2 + 5 / 6) / 2, "4": 1.0})
    assert found["amc"]["confidence_95"] == [1 / 4, 1 / 2]  # three equally likely means: 1/4, 3/8, 1/2
    assert (found["amc"]["avg_at_k"], found["amc"]["samples_per_problem"]) == (3 / 8, 4)
    assert found["math500"]["categories"] == {"Algebra": 0.5, "Precalculus": 1.0}
    assert found["mmlu_pro"]["categories"] == {"law": 0.5, "other": 1.0}
    assert "categories" not in found["gsm8k"]
    saved = [json.loads(line) for line in scored.read_text().splitlines()]
    assert len(saved) == 8 + 2 + 2 + 3 + 2 + 3
    assert [line["is_correct"] for line in saved[:8]] == [True, False, False, False, True, True, False, False]
    assert saved[2] == {
        "task": "amc", "problem": 0, "sample": 2, "category": "",
        "question": "What is $x+y$?\n\nReason step by step, and put your final answer within \\boxed{}.",
        "gold": "142", "text": "no idea", "reward": 0.0,
        "is_correct": False, "is_parsed": False, "is_truncated": False, "num_answer_tokens": 0,
    }  # fmt: skip
    code, again, errors = evaluate("--answers", scored, *benchmarks, "--json", "-")
    assert code == 0, errors
    assert json.loads(again)["tasks"] == json.loads(output)["tasks"]


def test_the_table_tells_of_tasks_and_of_categories(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "mmlu.jsonl", MMLU_PRO)
    answers = write_answers(
        tmp_path / "answers.jsonl", {("mmlu_pro", number): ["The answer is (D)", "?"] for number in range(3)}
    )
    code, output, errors = evaluate("--answers", answers, "--benchmark", f"mmlu_pro={path}", "--json", tmp_path / "o")
    assert code == 0, errors
    row = next(line for line in output.splitlines() if "mmlu_pro │" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["mmlu_pro", "3", "2", "0.167", "0.000-0.500", "1: 0.167  2: 0.333", "1/6", "3", "0", "0.0"]
    assert [line.split("│")[1:3] for line in output.splitlines() if "│ law" in line] == [[" law      ", " 0.250 "]]
    assert json.loads((tmp_path / "o").read_text())["tasks"][0]["num_unparsed"] == 3


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("amc", {"id": 1, "answer": 3.0}, 'got columns id, answer, expected a value of "problem" or "question"'),
        ("amc", {"problem": "Why?"}, 'got columns problem, expected a value of "answer"'),
        ("aime24", {"problem": "Why?", "answer": "1000"}, 'answer: got "1000", expected an integer from 0 to 999'),
        ("aime25", {"problem": "Why?", "answer": "x+1"}, 'answer: got "x+1", expected an integer from 0 to 999'),
        ("math500", {"problem": "Why?", "answer": "1"}, 'got columns problem, answer, expected a value of "subject"'),
        ("gsm8k", {"question": "Why?", "answer": "Two\nlines"}, 'answer: got "Two\\nlines", expected a final answer'),
        ("mmlu_pro", {**MMLU_PRO[0], "answer": "K"}, 'answer: got "K", expected the letter of one of 10 options'),
        ("mmlu_pro", {**MMLU_PRO[1], "answer": "E"}, 'answer: got "E", expected the letter of one of 10 options'),
        ("mmlu_pro", {**MMLU_PRO[0], "answer_index": 3}, 'answer_index: got 3 with answer "I", expected 8'),
        ("mmlu_pro", {**MMLU_PRO[0], "options": "A or B"}, 'options: got "A or B", expected a list of texts'),
        ("mmlu_pro", {**MMLU_PRO[0], "options": ["x", "N/A"], "answer": "A", "answer_index": 0},
         "options: got 1, expected 2 to 26"),
        ("mmlu_pro", {**MMLU_PRO[0], "category": None}, 'expected a value of "category"'),
    ],
)  # fmt: skip
def test_a_row_that_is_not_in_the_layout_is_told_with_its_place(
    name: str, row: Mapping[str, Any], said: str, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(OperatorError) as refused:
        load_benchmark(name, str(path))
    assert str(refused.value).startswith(f"{path}:1: ")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_empty_file_and_a_missing_one_are_told(tmp_path: Path) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(OperatorError, match=r"eval\.benchmarks: amc: got no rows from .*empty\.jsonl"):
        load_benchmark("amc", str(empty))
    with pytest.raises(OperatorError, match=r"missing\.jsonl: cannot be read \(No such file or directory\)"):
        load_benchmark("amc", str(tmp_path / "missing.jsonl"))


def test_every_known_benchmark_has_a_layout_and_a_split_for_each_published_id() -> None:
    assert set(LAYOUTS) == set(BenchmarkName)
    amc, gsm8k = LAYOUTS[BenchmarkName.AMC], LAYOUTS[BenchmarkName.GSM8K]
    assert split_of_source(amc, "AI-MO/aimo-validation-amc") == ("AI-MO/aimo-validation-amc", "train")
    assert split_of_source(amc, "math-ai/amc23") == ("math-ai/amc23", "test")
    assert split_of_source(amc, "me/mine") == ("me/mine", "test")
    assert split_of_source(gsm8k, "openai/gsm8k:socratic") == ("openai/gsm8k:socratic", "test")
    assert split_of_source(gsm8k, "openai/gsm8k:main[train]") == ("openai/gsm8k:main", "train")


def test_a_subset_is_drawn_by_the_seed_and_keeps_the_numbers_of_the_rows(tmp_path: Path) -> None:
    rows = [{"problem": f"{number}?", "answer": number} for number in range(50)]
    request = f"aime25={write_jsonl(tmp_path / 'rows.jsonl', rows)}"
    (whole,), (some,), (again,) = tasks_of(request), *[tasks_of(request, max_benchmark_problems=7)] * 2
    assert whole.problems == range(50)
    assert some.problems == again.problems
    assert (len(some.problems), sorted(set(some.problems))) == (7, list(some.problems))
    assert [some.golds[problem] for problem in some.problems] == [str(problem) for problem in some.problems]
    assert tasks_of(request, max_benchmark_problems=99)[0].problems == range(50)


def test_a_family_of_reasoning_gym_is_a_benchmark_of_as_many_questions_as_it_has() -> None:
    (leg_counting, coin_flip) = tasks_of("reasoning_gym/leg_counting", "reasoning_gym/coin_flip", num_problems=5)
    assert (leg_counting.name, leg_counting.problems) == ("reasoning_gym/leg_counting", range(5))
    assert 0 < len(coin_flip.problems) <= 5


@pytest.mark.parametrize(
    ("benchmarks", "said"),
    [
        (["reasoning_gym/no_such_family"], "eval.benchmarks: reasoning_gym/no_such_family: "),
        (["reasoning_gym/leg_counting=x.jsonl"], 'expected no source ("x.jsonl") for a family'),
        (["amx"], 'eval.benchmarks: got "amx", expected one of amc, aime24, aime25, math500, gsm8k, mmlu_pro'),
        (["amc=a.jsonl", "amc=b.jsonl"], 'eval.benchmarks: got "amc" 2 times, expected it once'),
        ([], "eval.held_out: got false without eval.benchmarks, expected something to evaluate on"),
    ],
)
def test_benchmarks_that_cannot_be_are_refused(benchmarks: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        tasks_of(*benchmarks)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


ONE = {"task": "amc", "problem": 0, "sample": 0, "text": r"\boxed{142}"}
TWO = {**ONE, "problem": 1}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["no json"], 'answers.jsonl:1: got "no json", expected a JSON object'),
        ([{"task": "amc", "problem": 0, "sample": 0}], 'got columns task, problem, sample, expected a value of "text"'),
        ([{**ONE, "problem": "0"}], 'answers.jsonl:1: problem: got "0", expected an integer'),
        ([{**ONE, "sample": -1}], "answers.jsonl:1: sample: got -1, expected 0 or more"),
        ([ONE, TWO, {**ONE, "sample": 4096}], "answers.jsonl:3: sample: got 4096, expected less than 4096"),
        ([{**ONE, "is_truncated": "yes"}], 'is_truncated: got "yes", expected true or false'),
        ([{**ONE, "task": "aime24"}], 'answers.jsonl:1: task: got "aime24", expected amc'),
        ([ONE, {**ONE, "problem": 7}], "answers.jsonl:2: problem: got 7 of amc, expected 0 to 1"),
        ([ONE, TWO, ONE], "answers.jsonl:3: got the same task, problem and sample as "),
        ([ONE], "answers.jsonl: got no answer to amc problem 1 sample 0, expected 1 to each of its 2 problems"),
        ([ONE, {**ONE, "sample": 1}, TWO], "got no answer to amc problem 1 sample 1, expected 2 to each of its 2"),
        ([], "answers.jsonl: got no answers, expected a line for each"),
    ],
)
def test_answers_that_cannot_be_scored_are_told_in_one_line(lines: list[Any], said: str, tmp_path: Path) -> None:
    from actors.evaluator.saved import SavedAnswers

    path = tmp_path / "answers.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    tasks = tasks_of(f"amc={write_jsonl(tmp_path / 'amc.jsonl', AIMO_AMC)}")
    with pytest.raises(OperatorError) as refused:
        SavedAnswers(path, tasks)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--benchmark", "amc"], "--benchmark: got neither --model nor --answers, expected one"),
        (["--json", "-"], "--json: got neither --model nor --answers, expected one"),
        (["--model", "m", "--answers", "a"], "--answers: got --model too, expected one of them"),
        (["--model", "nowhere", "--benchmark", "amc"], "model.path: got 'nowhere', expected a Hugging Face folder"),
        (["--answers", "a.jsonl", "--benchmark", "amc=missing.jsonl"], "missing.jsonl: cannot be read"),
        (
            ["--answers", "a.jsonl", "eval.samples_per_problem=4"],
            "eval.samples_per_problem: got 4 with eval.temperature 0",
        ),
    ],
)
def test_a_wrong_command_is_told_in_one_line(arguments: list[str], said: str) -> None:
    code, output, errors = evaluate(*arguments)
    assert (code, output) == (2, "")
    assert said in errors
    assert errors.startswith("chord-eval: ")
    assert errors.count("\n") == 1, errors


def test_a_dataset_that_cannot_be_fetched_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    answers = write_jsonl(tmp_path / "answers.jsonl", [ONE])
    code, _, errors = evaluate("--answers", answers, "--benchmark", "amc")
    assert code == 2
    *before, last = errors.splitlines()
    assert "AI-MO/aimo-validation-amc[train]: cannot be fetched" in last
    assert all("fetching" in line or "waiting" in line for line in before), errors


def test_columns_of_a_benchmark_can_be_named_also_inside_of_objects(tmp_path: Path) -> None:
    row = {
        "prompt": "1+1?",
        "reward_model": {"ground_truth": "2"},
        "of": {"text": ["1", "2"]},
        "key": "B",
        "kind": "sum",
    }
    path = write_jsonl(tmp_path / "mine.jsonl", [row])
    assert load_benchmark("gsm8k", f"{path}?question=prompt&answer=reward_model.ground_truth").golds == ["2"]
    choice = load_benchmark("mmlu_pro", f"{path}?question=prompt&options=of.text&answer=key&category=kind")
    assert choice.golds == ["B"]
    assert choice.environment.episode("held_out", 0).category == "sum"


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ("?question=text", ':1: got columns question, answer, expected a value of "text"'),
        ("?answer=answer.final", ':1: got columns question, answer, expected a value of "answer.final"'),
        ("?prompt=question", 'eval.benchmarks: gsm8k: got "prompt=question" after the ?, expected PART=COLUMN'),
        ("?question", 'eval.benchmarks: gsm8k: got "question" after the ?, expected PART=COLUMN'),
        ("[train]", "expected no split of a single file"),
    ],
)
def test_columns_and_splits_that_are_not_there_are_told_in_one_line(columns: str, said: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "gsm8k.jsonl", GSM8K)
    with pytest.raises(OperatorError) as refused:
        load_benchmark("gsm8k", f"{path}{columns}")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
