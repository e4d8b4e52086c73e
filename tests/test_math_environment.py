"""The environment math: real tables, the real math-verify in its real process."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.environment import Judgement, Turn, make_environment
from actors.environments.answers import (
    boxed_answer,
    gold_answer,
    last_number,
    leading_expression,
    stated_answer,
)
from actors.environments.comparer import LIMIT_S, Comparer
from actors.environments.comparison import Verdict
from actors.environments.math import Math, MathProblems, MathTask
from actors.environments.spelling import is_same
from common.errors import ConfigError, OperatorError
from common.problems import split_of

ENDLESS = r"$9^{9^{9^{9}}}$"
"""What math-verify needs its own limit of 2 s for."""
USE_AND_WAIT = """
import time
from actors.environments.comparer import Comparer
comparer = Comparer()
comparer.compare("1", "$2$")
print(comparer.pid, flush=True)
{then}
"""


@pytest.fixture
def comparer() -> Iterator[Comparer]:
    with closing(Comparer()) as opened:
        yield opened


def write_questions(path: Path, num_rows: int, **columns: Callable[[int], Any]) -> Path:
    """Rows of addition; `columns` make other ones."""
    makers = columns or {"question": lambda n: f"What is {n} + {n}?", "answer": lambda n: f"work\n#### {2 * n}"}
    rows = ({name: make(n) for name, make in makers.items()} for n in range(num_rows))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def judge(gold: str, text: str, *, reward: str = "binary", is_truncated: bool = False) -> Judgement:
    task = MathTask("?", gold)
    return MathProblems(train=[], held_out=[task], reward=reward).judge(task, text, is_truncated=is_truncated)


def is_gone(pid: int, *, within_s: float) -> bool:
    """Whether a process has ended, or does so in time; a zombie has."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.05)
                continue
        return True
    return False


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{72}", "72"),
        (r"\boxed{1} and then \boxed{ 2 }.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{\frac{1}{2}\right.}", r"\left\{\frac{1}{2}\right."),
        (r"\fbox{5}", "5"),
        (r"\boxed{7} but \boxed{}", "7"),
        (r"\boxed{7} but \boxed{8", "7"),
        (r"\boxed{" + "x" * 2000 + "}", None),
        (r"\boxed 5", None),
        ("72", None),
    ],
)
def test_the_last_whole_box_is_found(text: str, answer: str | None) -> None:
    assert boxed_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 72.", "72"),
        ("The answer is 3.14. That was easy.", "3.14"),
        ("the final answer is: **72**", "72"),
        ("**Answer:** $x = 5$.", "$x = 5$"),
        ("First answer: 1\nNo, the answer is\n\n2\nok", "2"),
        ("work\n#### 1,234", "1,234"),
        ("The answer is 3\n#### 4", "4"),
        ("The answer is: ...", None),
        ("The answer is .5", ".5"),
        ("#### .5", ".5"),
        ("the answer = 12", "12"),
        ("So the answer would be 12.", "12"),
        ("The answer to the question is 12.", "12"),
        ("The answer is:\n\\[\n12\n\\]", "\\[\n12\n\\]"),
        ("**Final Answer**\n\n12", "12"),
        ("### Final Answer\n$12$", "$12$"),
        ("### Final Answer\nThere are 3 rows.", None),
        ("#### Step 3: add", None),
        ("#### 2. Check it", None),
        ("#### **2. Check it**", None),
        ("The answer is 72.\n\n#### Check\nfine", "72"),
        ("The answer to this problem depends on whether n is 3", None),
        ("The answer would not be 12.", None),
        ("answers are isomorphic", None),
        ("72", None),
    ],
)
def test_the_last_stated_answer_is_found(text: str, answer: str | None) -> None:
    assert stated_answer(text) == answer


@pytest.mark.parametrize(
    ("phrase", "expression"),
    [
        ("12 because there are 3 rows", "12"),
        ("$18 for 2 days", "18"),
        ("€18", "18"),
        ("18 out of 20", "18"),
        ("12 (3 rows of 4)", "12"),
        ("12, not 13", "12"),
        ("not 12", None),
        ("definitely not $12$", None),
        ("3*4 = 12", "12"),
        ("12 dollars = 1200 cents", "1200"),
        ("x = 5", "5"),
        ("$x = 5$ because $y = 3$", "5"),
        ("x = 5, y = 6", "x = 5, y = 6"),
        ("5 or 6", "5 or 6"),
        ("x = 5 or x = 6", "x = 5 or x = 6"),
        ("5 and it is odd", "5"),
        ("12 to 15", "12 to 15"),
        ("a 12 cm rope", "12"),
        ("12cm", "12cm"),
        ("2xy + 1", "2xy + 1"),
        ("12 cows + 3", "12 cows + 3"),
        ("that there are $12 \\text{ big}$ cows", "12 \\text{ big}"),
        ("(1, 2)", "(1, 2)"),
        ("1,234 dollars", "1,234"),
        ("3/4 of 8", "3/4"),
        ("1 1/2 cups", r"1\frac{1}{2}"),
        ("-.5", "-.5"),
        ("2*sqrt(3)", r"2*\sqrt{3}"),
        ("2pi", r"2\pi"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        ("\\[\n12\n\\]", "12"),
        ("unknown", None),
    ],
)
def test_the_leading_expression_of_a_phrase_is_found(phrase: str, expression: str | None) -> None:
    assert leading_expression(phrase) == expression


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 plus 5 gives 8.", "8"),
        ("7-5", "5"),
        ("so x = -5", "-5"),
        ("so x = −5, as was asked", "-5"),
        ("+4", "4"),
        ("1,234 or 1,2", "2"),
        ("it costs $1,234.50.", "1,234.50"),
        ("the 10th of 3 in v2", "3"),
        ("it is 8cm long", "8"),
        ("答案是5", "5"),
        ("see 1.2.3", None),
        ("none", None),
    ],
)
def test_the_last_number_is_found(text: str, number: str | None) -> None:
    assert last_number(text) == number


def test_the_last_number_counts_only_where_it_is_asked_for_and_nothing_is_stated() -> None:
    task = MathTask("?", "8")
    usual, lenient = (
        MathProblems(train=[], held_out=[task], extraction=extraction) for extraction in ("stated", "last_number")
    )
    sentence = "3 plus 5 gives 8"
    assert usual.judge(task, sentence, is_truncated=False) == Judgement(0.0, is_parsed=False)
    assert lenient.judge(task, sentence, is_truncated=False) == Judgement(1.0)
    assert lenient.judge(task, "The answer is 7. Not 8", is_truncated=False) == Judgement(0.0)
    assert lenient.judge(task, "no idea", is_truncated=False) == Judgement(0.0, is_parsed=False)


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("72", "72"),
        (" 3/4 \n", "3/4"),
        ("He has 3 + 4 = <<3+4=7>>7.\n#### 7", "7"),
        ("We get\n$\\boxed{\\frac{1}{2}}$.", r"\frac{1}{2}"),
        ("a proof\nof several lines", None),
        ("####", None),
    ],
)
def test_the_gold_answer_of_a_row_may_stand_at_the_end_of_its_solution(text: str, gold: str | None) -> None:
    assert gold_answer(text) == gold


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("72", "72", True),
        ("72", r"\$ 72 .", True),
        ("025", "25", True),
        ("1234", "1,234", True),
        ("1234", "1{,}234", True),
        ("0.5", r"\dfrac{1}{2}", True),
        ("1/2", "2/4", True),
        ("-5", "−5", True),
        ("5", "5.0", True),
        (r"\left( 1, 2 \right)", "(1,2)", True),
        (r"\text{June 20}", "June 20", True),
        ("x^{2}+1", "x²+1", True),
        ("0.5", ".5", True),
        ("72", "73", False),
        ("100101", "100,101", True),
        ("100101", "100, 101", None),
        ("11/2", "1 1/2", None),
        ("1/3", "0.333333", None),
        ("50", r"50\%", None),
        ("1/2", "1/0", None),
        ("9" * 60, "9" * 61, None),
        ("x+1", "1+x", None),
    ],
)
def test_a_look_tells_same_from_different_or_leaves_it_open(gold: str, answer: str, same: bool | None) -> None:
    assert is_same(gold, answer) is same


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("72", r"\boxed{72}"),
        ("72", "The answer is 72 dollars."),
        ("72", r"\boxed{72\text{ dollars}}"),
        ("1,234", r"\boxed{1234}"),
        (r"\frac{1}{2}", r"\boxed{0.5}"),
        ("0.5", "The answer is 1/2."),
        ("1/3", r"\boxed{0.333333}"),
        (r"50\%", r"\boxed{50}"),
        ("50", r"\boxed{50\%}"),
        ("(1, 2)", r"\boxed{(1,2)}"),
        (r"\{1, 2\}", r"\boxed{\{2, 1\}}"),
        ("5", r"\boxed{x = 5}"),
        ("x^2 + 1", r"\boxed{1 + x^2}"),
        (r"3\sqrt{2}", r"\boxed{\sqrt{18}}"),
        (r"\frac{1}{2}", r"The answer is \frac{2}{4}."),
        (r"\text{Monday}", r"\boxed{Monday}"),
        ("$72$", "#### 72"),
        ("12", "The answer is 12 because there are 3 rows."),
        ("18", "The answer is $18 for 2 days."),
        ("18", "The answer is 18 out of 20."),
        ("12", "The answer is 12, not 13."),
        ("72", "The answer is 73. Wait, no: the answer is 72."),
        ("73", "The answer is 72. Wait, no: the answer is 73."),
        ("72", "#### 72 dollars"),
        ("72", "#### 72 apples"),
        ("12", "The answer is 3*4 = 12."),
        ("5", "The answer is x = 5"),
        ("5, 6", "The answer is 5 or 6."),
        ("x=5,y=6", "The answer is x = 5, y = 6."),
        ("y=2x+1", "The answer is y = 1 + 2x."),
        ("(1, 2)", "The answer is (1, 2)."),
        ("1.5", "The answer is 1 1/2 cups."),
        ("0.75", "The answer is 3/4 of it."),
        ("50", "The answer is 50% of 8."),
        ("1234", "The answer is 1,234 dollars."),
        ("60", "The answer is 60 km/h for 2 hours."),
        ("12", "The answer is 12cm."),
        ("12", "The answer is 12 L."),
        (r"2\sqrt{3}", "The answer is 2*sqrt(3)."),
        ("0.5", "The answer is .5"),
        ("0.5", "#### .5"),
        ("1234", "work\n#### 1,234"),
        ("12", "The answer is:\n\\[\n12\n\\]"),
        ("12", "The answer is:\n$$\n12\n$$"),
        ("12", "**Final Answer**\n\n12"),
        ("12", "### Final Answer\n12"),
        ("12", "the answer = 12"),
        ("12", "So the answer would be 12."),
        ("12", "The answer to the question is 12."),
        ("5", "Answer: (5)"),
        ("5", "The answer is [5]."),
        ("72", "The answer is 72.\n\n#### Check\nfine"),
        ("90", r"\boxed{90°}"),
        ("12", r"\boxed{12~}"),
        (r"\frac{1}{2}", r"\boxed{½}"),
        ("1.5", r"\boxed{1½}"),
        ("x^2+1", r"\boxed{x²+1}"),
        (r"3\sqrt{2}", r"\boxed{3√2}"),
        ("12", r"\boxed{\underline{12}}"),
        ("12", r"\boxed{\color{red}12}"),
        (r"\text{June 20}", r"\boxed{June 20}"),
    ],
)
def test_right_answers_are_right_in_any_spelling(gold: str, text: str) -> None:
    assert judge(gold, text) == Judgement(1.0, is_parsed=True)


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("72", r"\boxed{73}"),
        ("72", r"The answer is 72. No: \boxed{73}"),
        ("(1, 2)", r"\boxed{(2,1)}"),
        ("1/3", r"\boxed{0.33}"),
        ("2", r"\boxed{2, 3}"),
        (r"\text{Monday}", r"\boxed{Tuesday}"),
        ("3", "The answer is 12 because there are 3 rows."),
        ("2", "The answer is $18 for 2 days."),
        ("20", "The answer is 18 out of 20."),
        ("12", "The answer is 13, not 12."),
        ("3", "The answer is 3*4 = 12."),
        ("6", "The answer is 5 or 6."),
        ("5", "The answer is 5 or 6."),
        ("5", "The answer is x = 5 or x = 6."),
        ("6", "The answer is x = 5 or x = 6."),
        ("12", "The answer is 12 to 15."),
        ("6", "The answer is x = 5, y = 6."),
        ("2", "The answer is (1, 2)."),
        ("1", "The answer is 1 1/2 cups."),
        ("4", "The answer is 3/4 of it."),
        ("1", "The answer is x + 1."),
        ("2", "The answer is 2xy + 1."),
        ("2", "The answer is 2*sqrt(3)."),
        ("2", "The answer is 2pi."),
        ("5", "The answer is .5"),
        ("5", "#### .5"),
        ("234", "work\n#### 1,234"),
        ("2", "The answer is:\n\\[\n12\n\\]"),
        ("2", "The answer is:\n$$\n12\n$$"),
        ("2", "**Final Answer**\n\n12"),
        ("2", "### Final Answer\n12"),
        ("13", "the answer = 12"),
        ("13", "So the answer would be 12."),
        ("13", "The answer to the question is 12."),
        ("4", "Answer: (5)"),
        ("4", "The answer is [5]."),
        ("73", "The answer is 72.\n\n#### 73. Check\nfine"),
        ("100101", r"\boxed{100, 101}"),
        ("9", r"\boxed{90°}"),
        ("1", r"\boxed{12~}"),
        ("2", r"\boxed{½}"),
        ("2x+1", r"\boxed{x²+1}"),
        ("32", r"\boxed{3√2}"),
        ("13", r"\boxed{\underline{12}}"),
        ("13", r"\boxed{\color{red}12}"),
        (r"\text{June 21}", r"\boxed{June 20}"),
    ],
)
def test_wrong_answers_are_wrong(gold: str, text: str) -> None:
    assert judge(gold, text) == Judgement(0.0, is_parsed=True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "72",
        "no idea",
        "the answer is unknown",
        "The answer is not 72.",
        "The answer would not be 72.",
        "#### Step 72: add",
        "#### 72. Check it",
        "### Final Answer\nThere are 72 rows.",
        r"\boxed{}",
        r"\boxed{((((}",
    ],
)
def test_an_answer_that_cannot_be_read_scores_0_and_is_counted(text: str) -> None:
    assert judge("72", text) == Judgement(0.0, is_parsed=False)


@pytest.mark.parametrize(
    ("text", "is_truncated", "reward"),
    [
        (r"\boxed{72}", False, 1.0),
        ("The answer is 72.", False, 1.0),
        (r"\boxed{72} and on and on", True, 1.0),
        (r"\boxed{73}", False, 0.0),
        (r"\boxed{73} and on and on", True, 0.0),
        ("The answer is 73.", False, -0.1),
        ("The answer is 73. And on", True, -0.1),
        ("no idea", False, -0.1),
        ("on and on", True, -1.0),
        (r"\boxed{7", True, -1.0),
    ],
)
def test_the_four_levels(text: str, is_truncated: bool, reward: float) -> None:
    assert judge("72", text, reward="four_level", is_truncated=is_truncated).reward == reward
    assert judge("72", text, is_truncated=is_truncated).reward == max(reward, 0.0)


def test_the_gold_answer_is_compared_as_gold(comparer: Comparer) -> None:
    assert comparer.compare("1 < x < 2", "$(1, 2)$") is Verdict.SAME
    assert comparer.compare("(1, 2)", "$1 < x < 2$") is Verdict.DIFFERENT


def test_an_absurd_answer_is_given_up_and_the_next_one_is_compared(comparer: Comparer) -> None:
    assert comparer.compare("72", ENDLESS) is not Verdict.SAME
    assert comparer.compare("1/3", r"$\frac{2}{6}$") is Verdict.SAME


@pytest.mark.parametrize("stuck", [ENDLESS, r"$\lfloor 123456789^{987654321} / 7 \rfloor$"])
def test_a_child_that_does_not_answer_is_killed_and_started_again(
    stuck: str, comparer: Comparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert comparer.compare("1", "$2$") is Verdict.DIFFERENT
    first = comparer.pid
    assert first
    with monkeypatch.context() as hasty:
        hasty.setattr(comparer, "_limit_s", 0.5)
        assert comparer.compare("72", stuck) is Verdict.UNREADABLE
    assert is_gone(first, within_s=5)
    assert comparer.compare("1/3", r"$\frac{2}{6}$") is Verdict.SAME
    assert comparer.pid != first


def test_a_killed_child_costs_no_answer(comparer: Comparer) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM):
        assert comparer.compare("1", "$2$") is Verdict.DIFFERENT
        assert comparer.pid
        os.kill(comparer.pid, number)
        assert comparer.compare("x+1", "$1+x$") is Verdict.SAME


def test_a_closed_comparer_leaves_no_child_and_starts_another_when_asked() -> None:
    comparer = Comparer()
    assert comparer.pid is None
    comparer.compare("1", "$2$")
    assert comparer.pid
    pid = comparer.pid
    comparer.close()
    assert is_gone(pid, within_s=5)
    assert comparer.compare("2", "$2$") is Verdict.SAME
    comparer.close()


@pytest.mark.parametrize(
    ("then", "within_s"), [("time.sleep(60)", 5.0), (f"comparer.compare('72', r'{ENDLESS}'); time.sleep(60)", 20.0)]
)
def test_the_child_dies_with_a_parent_that_was_killed(then: str, within_s: float) -> None:
    command = [sys.executable, "-c", USE_AND_WAIT.format(then=then)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    time.sleep(0.2)
    assert not is_gone(pid, within_s=0.1)
    parent.kill()
    parent.communicate(timeout=10)
    assert is_gone(pid, within_s=within_s)


def test_a_parent_that_ends_by_itself_leaves_no_child_and_says_nothing() -> None:
    command = [sys.executable, "-W", "error", "-c", USE_AND_WAIT.format(then="")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert is_gone(int(done.stdout), within_s=5)
    assert done.stderr == ""


def test_a_long_sum_is_compared_or_given_up_within_the_limit(comparer: Comparer) -> None:
    comparer.compare("1", "$2$")
    started = time.monotonic()
    assert comparer.compare("72", "$" + "1+" * 400 + "1$") is not Verdict.SAME
    assert time.monotonic() - started < 2 * LIMIT_S


def test_threads_take_turns(comparer: Comparer) -> None:
    with ThreadPoolExecutor(max_workers=8) as pool:
        verdicts = list(pool.map(lambda n: comparer.compare(str(n), f"${n - n % 2}+0$"), range(40)))
    assert verdicts == [Verdict.SAME, Verdict.DIFFERENT] * 20


def test_common_answers_wait_for_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Comparer, "compare", None)
    for n in range(100):
        assert judge(str(n), rf"some words, so \boxed{{{n}}}.").reward == 1.0


def test_one_child_compares_one_answer_after_another(comparer: Comparer) -> None:
    pids: set[int | None] = set()
    for n in range(100):
        assert comparer.compare(f"{n}x+1", f"$1+{n}x$") is Verdict.SAME
        pids.add(comparer.pid)
    assert len(pids) == 1


def test_an_episode_is_judged_in_a_thread() -> None:
    problems = MathProblems(train=[], held_out=[MathTask("1+1?", "x+1", category="sums")])
    episode = problems.episode("held_out", 0)

    async def play() -> Turn:
        await episode.begin()
        return await episode.answer(r"\boxed{1+x}", is_truncated=False)

    assert asyncio.run(play()) == Turn(1.0)
    assert episode.category == "sums"


def test_training_goes_round_and_held_out_questions_end() -> None:
    tasks = [MathTask(f"{n}?", str(n)) for n in range(3)]
    problems = MathProblems(
        train=tasks, held_out=tasks[:1], system_prompt="Be brief.", prompt_template="Q: {question} {}"
    )
    assert [problems.task("train", n)[0].answer for n in range(7)] == list("0120120")
    assert problems.task("held_out", 0)[0] is tasks[0]
    with pytest.raises(IndexError, match="only 1 held-out questions"):
        problems.task("held_out", 1)
    with pytest.raises(IndexError, match="only 0 train questions"):
        MathProblems(train=[], held_out=tasks).task("train", 0)
    messages = problems.task("train", 1)[1]
    assert [(message.role, message.content) for message in messages] == [("system", "Be brief."), ("user", "Q: 1? {}")]


def test_a_question_of_the_table_is_held_out_by_its_hash_on_any_machine(tmp_path: Path) -> None:
    source = str(write_questions(tmp_path / "sums.jsonl", 200))
    one, other = Math(seed=0, source=source), Math(seed=7, source=source)
    train = {one.task("train", index)[0].question for index in range(200)}
    held_out = [one.task("held_out", index)[0].question for index in range(20)]
    assert {split_of(question) for question in train} == {"train"}
    assert {split_of(question) for question in held_out} == {"held_out"}
    assert [other.task("held_out", index)[0].question for index in range(20)] == held_out
    task, messages = one.task("train", 0)
    assert task == MathTask(task.question, task.answer, f"{source}:{int(task.answer) // 2 + 1}")
    assert (
        messages[-1].content == f"{task.question}\n\nReason step by step, and put your final answer within \\boxed{{}}."
    )


def test_a_table_of_held_out_questions_is_kept_out_of_training(tmp_path: Path) -> None:
    source = str(write_questions(tmp_path / "train.jsonl", 30))
    held_out = str(write_questions(tmp_path / "test.jsonl", 10))
    environment = Math(seed=0, source=source, held_out_source=held_out, num_train_problems=5)
    assert [environment.task("train", index)[0].answer for index in range(6)] == ["20", "22", "24", "26", "28", "20"]
    assert [environment.task("held_out", index)[0].answer for index in range(10)] == [str(2 * n) for n in range(10)]


def test_a_downloaded_dataset_has_both_splits_in_one_folder(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for split, answers in (("train", [1, 2]), ("test", [3])):
        table = pyarrow.Table.from_pylist([{"problem": f"{n}?", "answer": n} for n in answers])
        pyarrow.parquet.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    environment = Math(seed=0, source=str(tmp_path), held_out_split="test")
    assert [environment.task("train", index)[0].answer for index in range(2)] == ["1", "2"]
    assert environment.task("held_out", 0)[0].answer == "3"


def test_repeated_questions_count_once(tmp_path: Path) -> None:
    source = str(write_questions(tmp_path / "a.jsonl", 300, question=lambda n: f"{n % 60}?", answer=lambda n: n % 60))
    environment = Math(seed=0, source=source)
    first = environment.task("train", 0)[0]
    num_train = next(n for n in range(1, 300) if environment.task("train", n)[0] is first)
    num_held_out = sum(split_of(f"{n}?") == "held_out" for n in range(60))
    assert num_train == 60 - num_held_out
    with pytest.raises(IndexError):
        environment.task("held_out", num_held_out)


def test_columns_are_mapped_by_options(tmp_path: Path) -> None:
    makers: dict[str, Callable[[int], Any]] = {"q": lambda n: f"{n}?", "a": lambda n: n, "level": lambda n: n % 3}
    source = str(write_questions(tmp_path / "a.jsonl", 40, **makers))
    columns = {"question_column": "q", "answer_column": "a", "category_column": "level"}
    environment = make_environment("math", seed=0, options={"source": source, **columns})
    task = environment.task("train", 0)[0]  # pyright: ignore
    assert task.category == str(int(task.answer) % 3)


@pytest.mark.parametrize(
    ("columns", "mistake"),
    [
        (
            {"text": str},
            'a.jsonl:1: got columns text, expected a value of "question" or "problem" or "prompt" or "Question"',
        ),
        ({"question": str}, 'got columns question, expected a value of "answer" or "final_answer"'),
        ({"question": int, "answer": int}, "a.jsonl:1: question: got 0, expected text"),
        ({"question": str, "answer": lambda n: float("nan")}, "a.jsonl:1: answer: got NaN, expected text or a number"),
        ({"question": str, "answer": lambda n: float("inf")}, "a.jsonl:1: answer: got Infinity, expected text or"),
        ({"question": str, "answer": lambda n: [n]}, "a.jsonl:1: answer: got [0], expected text or a number"),
        (
            {"question": str, "answer": lambda n: "a\nb"},
            r"expected a bare answer of one line, or one in \boxed{} or after",
        ),
    ],
)
def test_a_row_that_is_no_question_is_told_in_one_line(
    tmp_path: Path, columns: dict[str, Callable[[int], Any]], mistake: str
) -> None:
    source = str(write_questions(tmp_path / "a.jsonl", 3, **columns))
    with pytest.raises(OperatorError) as caught:
        Math(seed=0, source=source)
    assert mistake in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_decimal_of_a_parquet_file_is_a_number(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": f"{n}?", "answer": Decimal(f"{n}.50")} for n in range(9)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    task = Math(seed=0, source=str(tmp_path / "a.parquet")).task("train", 0)[0]
    assert task.answer == task.question.replace("?", ".50")


@pytest.mark.parametrize(
    ("options", "mistake"),
    [
        ({"extraction": "any"}, 'environment.options.extraction: got "any", expected "stated" or "last_number"'),
        ({"reward": "ternary"}, 'environment.options.reward: got "ternary", expected "binary" or "four_level"'),
        ({"prompt_template": "Q: {}"}, 'prompt_template: got "Q: {}", expected text with {question} where'),
        ({"num_train_problems": 0}, "environment.options.num_train_problems: got 0, expected a whole number"),
        ({"colour": "red"}, "environment.options: math: got 'colour', expected options that it has"),
        (
            {"held_out_source": "sums.jsonl"},
            "environment.options.source: sums.jsonl: got 9 rows, none of them to train",
        ),
    ],
)
def test_a_wrong_option_is_a_configuration_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], mistake: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_questions(tmp_path / "sums.jsonl", 9)
    with pytest.raises(ConfigError) as caught:
        make_environment("math", seed=0, options={"source": "sums.jsonl", **options})
    assert mistake in str(caught.value)
    assert "\n" not in str(caught.value)


def test_twenty_thousand_questions_are_ready_in_a_moment(tmp_path: Path) -> None:
    source = str(write_questions(tmp_path / "many.jsonl", 20_000))
    started = time.process_time()
    Math(seed=0, source=source)
    assert time.process_time() - started < 10
