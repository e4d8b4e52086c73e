"""Options of environments: a wrong one is one line, a bug inside of an environment keeps its traceback."""

import json
from pathlib import Path
from typing import Any

import pytest

from actors import environment
from actors.environment import make_environment
from common.errors import ConfigError, OperatorError


class Mine:
    """A user's environment with a bug."""

    def __init__(self, *, seed: int, size: Any = 1) -> None:
        if size > 1:
            unknown: dict[str, Any] = {"colour": "red"}
            Mine(seed=seed, **unknown)
        self.size = size + "1"


class Offer:
    def load(self) -> type[Mine]:
        return Mine


def write_questions(folder: Path) -> str:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"q": {"text": f"{n}?"}, "answer": n}) + "\n" for n in range(20)))
    return str(path)


@pytest.mark.parametrize("size", [1, 2])
def test_a_bug_inside_of_an_environment_keeps_its_traceback(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_environment", lambda _: Offer())
    with pytest.raises(TypeError, match=r"unsupported operand|unexpected keyword argument 'colour'"):
        make_environment("mine", seed=0, options={"size": size})


@pytest.mark.parametrize(
    ("name", "options", "mistake"),
    [
        ("mine", {"colour": 1}, "environment.options: mine: got 'colour', expected options that it has"),
        ("mine", {"seed": 1}, "environment.options: mine: got 'seed', expected run.seed to set it"),
    ],
)
def test_arguments_that_an_environment_does_not_take_are_one_line(
    name: str, options: dict[str, Any], mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "find_environment", lambda _: Offer())
    with pytest.raises(ConfigError) as caught:
        make_environment(name, seed=0, options=options)
    assert str(caught.value) == mistake


@pytest.mark.parametrize(
    ("options", "mistake"),
    [
        ({"prompt_template": 5}, "environment.options.prompt_template: got 5, expected text with {question} where"),
        ({"system_prompt": 5}, "environment.options.system_prompt: got 5, expected text"),
        ({"source": 5}, "environment.options.source: got 5, expected text"),
        ({"held_out_source": ["a"]}, 'environment.options.held_out_source: got ["a"], expected text'),
        ({"question_column": 5}, "environment.options: got 5 as a column, expected its name"),
        ({"colour": 5}, "environment.options: math: got 'colour', expected options that it has"),
        ({"split": "test"}, 'environment.options.split: got "test" of '),
        ({"held_out_split": "test"}, 'environment.options.held_out_split: got "test" of '),
    ],
)
def test_an_option_of_the_wrong_kind_is_one_line(options: dict[str, Any], mistake: str, tmp_path: Path) -> None:
    usual = {"source": write_questions(tmp_path), "question_column": "q.text"}
    with pytest.raises(OperatorError) as caught:
        make_environment("math", seed=0, options={**usual, **options})
    assert str(caught.value).startswith(mistake)
    assert "\n" not in str(caught.value)


def test_what_an_environment_must_have_is_named() -> None:
    for name, option in {"math": "source", "reasoning_gym": "family"}.items():
        with pytest.raises(ConfigError, match=rf"^environment\.options: {name}: got no '{option}', expected it$"):
            make_environment(name, seed=0, options={})


def test_a_question_inside_of_an_object_is_read(tmp_path: Path) -> None:
    options = {"source": write_questions(tmp_path), "question_column": "q.text"}
    made: Any = make_environment("math", seed=0, options=options)
    task = made.task("train", 0)[0]
    assert task.question == f"{task.answer}?"
