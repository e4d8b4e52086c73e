"""Every family of reasoning_gym as an environment: quick to make, small in memory, and fair to answers of any form."""

import asyncio
import json
import os
import resource
import subprocess
import sys
from typing import Any

import pytest

from actors.environment import Turn
from actors.environments.reasoning import ReasoningGym
from actors.evaluator.tasks import FORM
from common.errors import ConfigError
from common.problems import ReasoningProblems

MEMORY = 4 << 30
CPU_S = 180
"""Address space of a process that makes all families, bytes."""
UNUSABLE = {"composite"}
"""Want parameters."""
UNANSWERED = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Of which reasoning_gym gives no answer that is right, as many are."""

EVERY_FAMILY = """
import json
from reasoning_gym.factory import DATASETS
from actors.environments.reasoning import ReasoningGym
for family in sorted(DATASETS):
    try:
        environment = ReasoningGym(seed=3, family=family)
        held_out, _ = environment.task("held_out", 0)
        train = [environment.task("train", index)[0].question for index in (0, 40)]
        right = environment.judge(held_out, held_out.answer, is_truncated=False)
        print(json.dumps([family, "", held_out.question in train or train[0] == train[1], right.reward]), flush=True)
    except Exception as error:
        print(json.dumps([family, str(error), False, 0.0]), flush=True)
"""


def bound() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))


def test_every_family_is_made_in_little_time_and_memory_and_takes_its_own_answers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", EVERY_FAMILY], capture_output=True, text=True, timeout=900, check=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        preexec_fn=bound,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) > 100
    assert {family: error for family, error, _, _ in lines if error}.keys() == UNUSABLE
    assert [family for family, _, repeats, _ in lines if repeats] == []
    assert {family for family, error, _, reward in lines if not error and reward < 1} <= UNANSWERED


@pytest.mark.parametrize("family", ["acre", "gsm_symbolic", "list_functions", "word_ladder"])
def test_problems_go_on_where_a_dataset_of_the_family_ends(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    problems = ReasoningProblems(family=family, seed=3)
    far = [problems.problem("train", index).question for index in (0, 1, 600, 601, 0)]
    assert far[0] == far[4]
    assert len(set(far)) == 4
    assert far[2] == ReasoningProblems(family=family, seed=3).problem("train", 600).question


def judged(text: str, **options: Any) -> tuple[float, bool]:
    environment = ReasoningGym(seed=0, family="leg_counting", **options)
    episode = environment.episode("held_out", 0)
    gold = environment.task("held_out", 0)[0].answer

    async def answered() -> Turn:
        await episode.begin()
        return await episode.answer(text.format(gold=gold), is_truncated=False)

    turn = asyncio.run(answered())
    return turn.reward, turn.is_parsed


@pytest.mark.parametrize(
    ("text", "plain", "asked"),
    [
        ("{gold}", (1.0, True), (1.0, True)),
        ("Cats have four.\n<answer>{gold}</answer>", (1.0, True), (1.0, True)),
        ("<answer>0</answer>", (0.0, True), (0.0, True)),
        ("I do not know", (0.0, True), (0.0, False)),
        ("", (0.0, False), (0.0, False)),
        ("<answer> </answer>", (0.0, False), (0.0, False)),
    ],
)
def test_a_wrong_answer_that_is_not_in_the_form_asked_for_counts_as_unread(
    text: str, plain: tuple[float, bool], asked: tuple[float, bool]
) -> None:
    assert judged(text)[1] == plain[1]
    assert judged(text)[0] == pytest.approx(plain[0], abs=0.02)  # its scorer gives 0.01 for trying
    assert judged(text, system_prompt=FORM)[1] == asked[1]
    assert judged(text, system_prompt=FORM)[0] == pytest.approx(asked[0], abs=0.02)


def test_a_family_that_does_not_exist_is_told_with_the_closest_one() -> None:
    with pytest.raises(ConfigError, match=r"leg_countin: got no family, expected one of .*, such as leg_counting"):
        ReasoningProblems(family="leg_countin")


def test_a_family_whose_problems_differ_between_processes_wants_their_hashes_to_be_fixed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("word_ladder", "knight_swap"):
        monkeypatch.setenv("PYTHONHASHSEED", "random")
        with pytest.raises(ConfigError, match=f"{name}: got no PYTHONHASHSEED in the environment, expected one"):
            ReasoningProblems(family=name)
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    ReasoningProblems(family="word_ladder")


@pytest.mark.parametrize("family", ["chain_sum", "leg_counting", "gcd"])
def test_seeds_of_runs_share_no_problem_by_being_neighbours(family: str) -> None:
    asked = [
        {environment.task("train", index)[0].question for index in range(40)}
        for environment in (ReasoningGym(seed=seed, family=family) for seed in range(3))
    ]
    assert max(len(asked[0] & asked[1]), len(asked[1] & asked[2]), len(asked[0] & asked[2])) <= 4
