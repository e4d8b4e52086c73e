"""Function calls: reading them, comparing them, and the environment that rewards them, from a real file."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.environment import Judgement, make_environment
from actors.environments.function_calling import FunctionCalling
from common.chat import ChatMessage
from common.errors import ConfigError, OperatorError
from common.function_calls import MAX_CHARS, MAX_DEPTH, read_calls
from common.problems import split_of

unhurried = settings(deadline=None, derandomize=True)
QUESTIONS = [f"What is the weather in city {i}?" for i in range(40)]
CALL = '[Weather API(city="city {}", days=3)]'

literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def write_prompts(folder: Path, *, system: str = "You may call functions.") -> str:
    rows = [{"system": system, "question": q, "answer": CALL.format(i)} for i, q in enumerate(QUESTIONS)]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def judge(answer: str, *, is_truncated: bool = False, folder: Path) -> Judgement:
    environment = FunctionCalling(seed=0, source=write_prompts(folder))
    task, _ = environment.task("train", 0)
    number = task.question.rstrip("?").rpartition(" ")[2]
    return environment.judge(task, answer.replace("{}", number), is_truncated=is_truncated)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('[f(a=1, b="x")]', "[ f( b = 'x' , a = 1 ) ]"),
        ("[f(a=1), g(b=2)]", "[g(b=2), f(a=1)]"),
        ("[f(a=1)]", "[f(a=1.0)]"),
        ("[f(a=(1, 2))]", "[f(a=[1, 2])]"),
        ('[f(a=True, b=None, c={"k": -1})]', '[f(a=true, b=null, c={"k": -1,})]'),
        ('[Market Trends API(from="a, (b")]', "[Market Trends API(from='a, (b')]"),
        ("[f(a={1: 2})]", '[f(a={"1": 2})]'),
        ("[f()]", "[f( ),]"),
        (r'[f(a="\d")]', r'[f(a="\\d")]'),
    ],
)
def test_calls_that_mean_the_same_are_equal(one: str, other: str) -> None:
    calls = read_calls(one)
    assert calls is not None
    assert calls == read_calls(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("[f(a=1)]", "[f(a=2)]"),
        ("[f(a=1)]", '[f(a="1")]'),
        ("[f(a=1)]", "[f(a=True)]"),
        ("[f(a=0)]", "[f(a=None)]"),
        ("[f(a=1)]", "[f(b=1)]"),
        ("[f(a=1)]", "[f(a=1, b=1)]"),
        ("[f(a=1)]", "[F(a=1)]"),
        ("[f(a=1)]", "[f(a=1), f(a=1)]"),
        ("[f(a=[1, 2])]", "[f(a=[2, 1])]"),
        ("[f(a='x')]", "[f(a='X')]"),
    ],
)
def test_calls_that_mean_different_things_differ(one: str, other: str) -> None:
    calls = read_calls(one), read_calls(other)
    assert None not in calls
    assert calls[0] != calls[1]


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "f(a=1)", "The answer is [f(a=1)]", "[f(a=1)] as asked", "[f]", "[(a=1)]", "[f(1)]", "[f(a=)]",
        "[f(=1)]", "[f(a=1, a=2)]", "[f(a=b)]", "[f(a=g())]", "[f(a=__import__('os'))]", "[f(a=1+1)]", "[f(a=b'x')]",
        "[f(a=1e999)]", "[f(a={[1]: 2})]", "[f(a={**{}})]", "[f(a={1})]", "[f(a=1)", "[f(a=1))]", "[f(a=[1)]]",
        "[f(a='x)]", "[f(a=1)g(b=2)]", "[f(a=1), , g(b=2)]", '["f(a=1)"]', "[f(a=...)]", "[f(a=f'{1}')]",
        "[f(**{'a': 1})]", "[f(a=\0)]", "[f(a=1or 2)]", "[f(a==1)]", "[f(a=1;b=2)]",
    ],
)  # fmt: skip
def test_what_is_no_list_of_calls_is_not_read(text: str) -> None:
    assert read_calls(text) is None


@pytest.mark.parametrize(
    "text",
    [
        f"[f(a={'9' * 5000})]",
        f"[f(a=0x{'f' * 15000})]",
        f"[f(a={'-' * 9000}1)]",
        f"[f(a={'~' * 9000}1)]",
        f"[f(a={'1+' * 9000}1)]",
        f"[f(a={'[' * (MAX_DEPTH + 1)}{']' * (MAX_DEPTH + 1)})]",
        f"[f(a={'[' * 9000}1{']' * 9000})]",
        f"[f(a='{'x' * MAX_CHARS}')]",
        f"[{'f' * MAX_CHARS}",
    ],
)
def test_hostile_text_is_refused_at_once(text: str) -> None:
    started = time.monotonic()
    assert read_calls(text) is None
    assert time.monotonic() - started < 2.0


@unhurried
@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), literals, max_size=4))
def test_any_literals_are_read_as_python_writes_them(arguments: dict[str, object]) -> None:
    written = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    reversed_ = ", ".join(f"{key}={value!r}" for key, value in reversed(arguments.items()))
    calls = read_calls(f"[f({written})]")
    assert calls is not None
    assert calls == read_calls(f"[f({reversed_})]")
    assert set(json.loads(calls[0])[1]) == set(arguments)


@unhurried
@given(st.text(alphabet="[](){}=,'\"\\ f1-:#\n", max_size=60))
def test_no_text_makes_the_reader_fail(text: str) -> None:
    calls = read_calls(f"[{text}]")
    assert calls is None or all(json.loads(call) for call in calls)


@pytest.mark.parametrize(
    ("answer", "reward", "is_parsed"),
    [
        ('[Weather API(city="city {}", days=3)]', 1.0, True),
        ("  [Weather API(days=3.0, city='city {}')]\n", 1.0, True),
        ('<think>[f()] or so?</think>\n\n[Weather API(city="city {}", days=3)]', 1.0, True),
        ('[Weather API(city="city {}", days=4)]', 0.0, True),
        ('[Weather API(city="city {}", days=3), Weather API(city="city {}", days=3)]', 0.0, True),
        ('I call [Weather API(city="city {}", days=3)]', 0.0, False),
        ('<think>[Weather API(city="city {}", days=3)]</think>', 0.0, False),
        ("It is sunny.", 0.0, False),
    ],
)
def test_the_expected_calls_alone_are_rewarded(answer: str, reward: float, is_parsed: bool, tmp_path: Path) -> None:
    assert judge(answer, folder=tmp_path) == Judgement(reward, is_parsed)


def test_an_answer_that_was_cut_off_is_judged_by_what_is_there(tmp_path: Path) -> None:
    assert judge('[Weather API(city="cit', is_truncated=True, folder=tmp_path) == Judgement(0.0, is_parsed=False)


def test_tasks_come_from_the_file_and_held_out_ones_by_the_hash_of_the_question(tmp_path: Path) -> None:
    environment = make_environment("function_calling", seed=0, options={"source": write_prompts(tmp_path)})
    assert isinstance(environment, FunctionCalling)
    held_out = [q for q in QUESTIONS if split_of(q) == "held_out"]
    train = [q for q in QUESTIONS if split_of(q) == "train"]
    assert [environment.task("held_out", i)[0].question for i in range(len(held_out))] == held_out
    assert [environment.task("train", i)[0].question for i in range(len(train) + 1)] == [*train, train[0]]
    with pytest.raises(IndexError):
        environment.task("held_out", len(held_out))
    _, messages = environment.task("train", 0)
    system = ChatMessage(role="system", content="You may call functions.")
    assert list(messages) == [system, ChatMessage(role="user", content=train[0])]


def test_without_a_system_text_there_is_no_system_message(tmp_path: Path) -> None:
    _, messages = FunctionCalling(seed=0, source=write_prompts(tmp_path, system="")).task("train", 0)
    assert [message.role for message in messages] == ["user"]


def test_a_table_whose_answers_are_no_calls_is_refused_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"system": "", "question": "why?", "answer": "because"}) + "\n")
    with pytest.raises(OperatorError, match=r'prompts\.jsonl:1: answer: got "because", expected calls such as'):
        FunctionCalling(seed=0, source=str(path))


def test_an_unknown_option_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"environment\.options: function_calling: .*colour"):
        make_environment("function_calling", seed=0, options={"source": "x.jsonl", "colour": 1})
