"""The environment multiple_choice: real tables, answers as models write them."""

import json
from pathlib import Path
from typing import Any

import pytest

from actors.environment import Judgement, make_environment
from actors.environments.multiple_choice import (
    ChoiceProblems,
    ChoiceTask,
    MultipleChoice,
    boxed_letter,
    lone_letter,
    read_task,
    stated_letter,
)
from common.errors import ConfigError, OperatorError
from common.problems import split_of
from common.tables import TableRow

TASK = ChoiceTask("Which is even?", ("1", "2", "3"), "B", category="numbers")
CAPITALS = ChoiceTask("Which is in England?", ("Paris", "London", "Rome", "Bonn"), "B")


def write_questions(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def judge(text: str, *, reward: str = "binary", is_truncated: bool = False) -> Judgement:
    return ChoiceProblems(train=[], held_out=[TASK], reward=reward).judge(TASK, text, is_truncated=is_truncated)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (B).", "B"),
        ("the answer is B", "B"),
        ("The answer is: **C**", "C"),
        ("**Answer:** D", "D"),
        ("The correct answer is option C.", "C"),
        ("The answer is\n(B)", "B"),
        (r"The answer is \(B\).", "B"),
        (r"The answer is $\textbf{(B)}$.", "B"),
        ("The answer is B. Because", "B"),
        ("The answer is A because it is.", "A"),
        ("The answer is (A). No, the answer is (B).", "B"),
        ("The answer is (B), not the answer is (Z).", "B"),
        ("The answer is (I).", "I"),
        ("The answer is I think (B)", None),
        ("The answer is Apple.", None),
        ("The answer is (b).", None),
        ("answer", None),
    ],
)
def test_the_last_stated_letter_of_an_option_is_found(text: str, letter: str | None) -> None:
    assert stated_letter(text, "ABCDEFGHIJ") == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"\boxed{C}", "C"),
        (r"\boxed{\text{C}}", "C"),
        (r"\boxed{(C)}", "C"),
        (r"\boxed{C. Paris}", "C"),
        (r"\boxed{A} or \boxed{B}", "B"),
        (r"\boxed{Z}", None),
        (r"\boxed{Cat}", None),
        (r"\boxed{72}", None),
        ("C", None),
    ],
)
def test_a_boxed_letter_is_found(text: str, letter: str | None) -> None:
    assert boxed_letter(text, "ABCD") == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("so\n(B)\nthat is it", "B"),
        ("**B**", "B"),
        ("I pick B.", "B"),
        ("A\nB\nC", "C"),
        ("it is vitamin Z", None),
        ("rich in vitamin C", None),
        ("It is not C.", None),
        ("It can't be C.", None),
        ("I would not pick option C.", None),
        ("It is not A, so C.", "C"),
        ("C is correct.", "C"),
        ("Option C is the right one", "C"),
        ("C is incorrect.", None),
        ("C is not correct.", None),
        ("Neither A nor C is correct.", None),
        ("I doubt that C is correct.", None),
        ("(c)", None),
        ("A. one\nB. two", None),
        ("A is wrong", None),
        ("it's", None),
        ("", None),
    ],
)
def test_a_letter_that_stands_alone_is_found(text: str, letter: str | None) -> None:
    assert lone_letter(text, "ABCD") == letter


@pytest.mark.parametrize("run", ["answer is ", "answer", "answer: A" + " " * 50, "\n", "A\n", "A ", r"\boxed{", "####"])
def test_long_runs_of_anything_are_read_in_a_moment(run: str) -> None:
    assert judge(run * (100_000 // len(run)) + "x").reward in (0.0, 1.0)


@pytest.mark.parametrize(
    ("text", "judgement"),
    [
        ("The answer is (B).", Judgement(1.0)),
        (r"\boxed{B}", Judgement(1.0)),
        ("A\nThe answer is (B). A", Judgement(1.0)),
        ("B", Judgement(1.0)),
        ("The answer is (A).", Judgement(0.0)),
        ("The answer is (D).", Judgement(0.0, is_parsed=False)),
        ("2", Judgement(1.0)),
        ("4", Judgement(0.0, is_parsed=False)),
        ("", Judgement(0.0, is_parsed=False)),
    ],
)
def test_the_letter_decides_and_a_text_without_one_is_unparsed(text: str, judgement: Judgement) -> None:
    assert judge(text) == judgement


@pytest.mark.parametrize(
    "right",
    [
        "`B`",
        "[B]",
        '"B"',
        "'B'",
        "{B}",
        "<B>",
        "__B__",
        "（B）",
        "<answer>B</answer>",
        "answer: b",
        "The answer is (b).",
        "The answer is (b) because",
        'The answer is "B".',
        "The answer would be B.",
        "(b)",
        "b",
        r"\boxed{b}",
        "Option B is correct.",
        "B is correct.",
        "The answer is London.",
        'The answer is "london".',
        r"\boxed{London}",
        r"\boxed{\text{London}}",
        "London",
        "**London**",
    ],
)
def test_a_letter_in_any_dress_or_an_option_itself_is_an_answer(right: str) -> None:
    problems = ChoiceProblems(train=[], held_out=[CAPITALS])
    assert problems.judge(CAPITALS, right, is_truncated=False) == Judgement(1.0)
    wrong = right.replace("(b)", "(c)").replace("B", "C").replace("London", "Paris").replace("london", "paris")
    wrong = {"b": "c", "answer: b": "answer: c", r"\boxed{b}": r"\boxed{c}"}.get(wrong, wrong)
    assert problems.judge(CAPITALS, wrong, is_truncated=False) == Judgement(0.0)


@pytest.mark.parametrize(
    "text",
    [
        "The answer is not B",
        "The answer is not (B).",
        "The answer is B or C.",
        "The answer is (B) or (C)",
        "The answer is not option B.",
        "The answer is not London.",
        "The answer is a big city.",
        "a city in England",
        "b is a city",
        "Londonderry",
        "rich in vitamin B",
        "(a)\nfirst\n(b)\nsecond",
        "The answer is <b>big</b>",
    ],
)
def test_a_word_or_a_denial_is_no_answer(text: str) -> None:
    problems = ChoiceProblems(train=[], held_out=[CAPITALS])
    assert problems.judge(CAPITALS, text, is_truncated=False) == Judgement(0.0, is_parsed=False)


def test_small_letters_are_options_of_their_own_where_the_options_are_such() -> None:
    task = ChoiceTask("Which is unknown?", ("b", "a"), "A")
    problems = ChoiceProblems(train=[], held_out=[task])
    assert problems.judge(task, "The answer is b.", is_truncated=False) == Judgement(1.0)
    assert problems.judge(task, "The answer is a.", is_truncated=False) == Judgement(0.0)
    assert problems.judge(task, "The answer is A.", is_truncated=False) == Judgement(1.0)


@pytest.mark.parametrize(
    ("text", "is_truncated", "reward"),
    [
        ("The answer is (B).", True, 1.0),
        ("B", False, 1.0),
        ("The answer is (A).", True, 0.0),
        ("A", False, -0.1),
        ("no idea", False, -0.1),
        ("on and on", True, -1.0),
    ],
)
def test_the_four_levels(text: str, is_truncated: bool, reward: float) -> None:
    assert judge(text, reward="four_level", is_truncated=is_truncated).reward == reward


def test_the_prompt_lists_the_options_and_asks_for_a_letter() -> None:
    messages = ChoiceProblems(train=[TASK], held_out=[]).task("train", 5)[1]
    assert [message.content for message in messages] == [
        "Which is even?\nA. 1\nB. 2\nC. 3\n\n"
        'Think step by step, and end with "The answer is (X)", where X is the right option\'s letter.'
    ]


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        (["x", "y"], "B", "B"),
        (["x", "y"], "(b)", "B"),
        (["x", "y"], 1, "B"),
        (["x", "y"], "y", "B"),
        (["b", "a"], "a", "B"),
        (["B", "A"], "A", "A"),
        (["A", "B", "AB", "O"], "AB", "C"),
        (["A", "B", "AB", "O"], "O", "D"),
        ([1, 2], "2", "B"),
        ([str(n) for n in range(26)], 25, "Z"),
    ],
)
def test_the_answer_of_a_row_is_a_letter_an_index_or_an_option(options: list[Any], answer: Any, letter: str) -> None:
    assert read_task(TableRow("", {"question": "?", "options": options, "answer": answer})).answer == letter


@pytest.mark.parametrize(
    ("values", "mistake"),
    [
        ({"options": ["x", "y"], "answer": "A"}, 'got columns options, answer, expected a value of "question" or'),
        (
            {"question": "?", "answer": "A"},
            'expected a value of "options" or "choices" (environment.options.options_co',
        ),
        ({"question": "?", "options": "x, y", "answer": "A"}, 'options: got "x, y", expected a list of texts'),
        ({"question": "?", "options": ["x"], "answer": "A"}, "got 1 options, expected 2 to 26"),
        ({"question": "?", "options": ["x"] * 27, "answer": "A"}, "got 27 options, expected 2 to 26"),
        ({"question": "?", "options": ["x", "y"]}, 'got columns question, options, expected a value of "answer" or'),
        (
            {"question": "?", "options": ["x", "y"], "answer": "C"},
            'got "C", expected a letter from A to B, an index from 0, or one of the options',
        ),
        (
            {"question": "?", "options": ["x", "y"], "answer": 2},
            "got 2, expected a letter from A to B, an index from 0",
        ),
        (
            {"question": "?", "options": ["x", "y"], "answer": -1},
            "got -1, expected a letter from A to B, an index from",
        ),
    ],
)
def test_a_row_that_is_no_question_is_told_in_one_line(values: dict[str, Any], mistake: str) -> None:
    with pytest.raises(OperatorError) as caught:
        read_task(TableRow("a.jsonl:3", values))
    assert str(caught.value).startswith("a.jsonl:3: ")
    assert mistake in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_becomes_tasks_with_categories_and_a_held_out_share(tmp_path: Path) -> None:
    rows = [
        {"q": f"Which is {n}?", "o": [str(n), "other"], "a": n % 2, "subject": ["even", "odd"][n % 2]}
        for n in range(99)
    ]
    columns = {"question_column": "q", "options_column": "o", "answer_column": "a"}
    source = str(write_questions(tmp_path / "a.jsonl", rows))
    environment = make_environment("multiple_choice", seed=0, options={"source": source, **columns})
    assert isinstance(environment, MultipleChoice)
    train = [environment.task("train", index)[0] for index in range(99)]
    held_out = [environment.task("held_out", index)[0] for index in range(10)]
    assert {split_of(task.question) for task in train} == {"train"}
    assert {split_of(task.question) for task in held_out} == {"held_out"}
    assert all(environment.category(task) == {"A": "even", "B": "odd"}[task.answer] for task in train + held_out)


def test_equal_questions_with_other_options_are_tasks_of_their_own_on_one_side(tmp_path: Path) -> None:
    rows = [{"question": "Which is true?", "options": [str(n), "none"], "answer": "A"} for n in range(8)]
    source = str(write_questions(tmp_path / "a.jsonl", [*rows, *rows]))
    environment = MultipleChoice(seed=0, source=source)
    assert split_of("Which is true?") == "train"
    assert [environment.task("train", index)[0].options[0] for index in range(9)] == list("012345670")
    with pytest.raises(IndexError, match="only 0 held-out questions"):
        environment.task("held_out", 0)


@pytest.mark.parametrize(
    ("options", "mistake"),
    [
        ({"reward": "some"}, 'environment.options.reward: got "some", expected "binary" or "four_level"'),
        ({"prompt_template": "?"}, 'environment.options.prompt_template: got "?", expected text with {question}'),
        (
            {"category": "x"},
            "environment.options: multiple_choice: got 'category', expected options that it has",
        ),
    ],
)
def test_a_wrong_option_is_a_configuration_error(tmp_path: Path, options: dict[str, Any], mistake: str) -> None:
    rows = [{"question": f"{n}?", "options": ["x", "y"], "answer": "A"} for n in range(20)]
    source = str(write_questions(tmp_path / "a.jsonl", rows))
    with pytest.raises(ConfigError) as caught:
        make_environment("multiple_choice", seed=0, options={"source": source, **options})
    assert str(caught.value).startswith(mistake)
    assert "\n" not in str(caught.value)
