"""Who runs on which cores: shares that never overlap, and processes that stay on theirs."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config.load import resolve_config
from common.config.run import Run
from common.config.schema import Actor, Config, Learner
from common.local.cores import describe_cores, handing_down, share_cores
from common.local.supervisor import Component

unhurried = settings(deadline=None, derandomize=True)
ROOT = Path(__file__).parents[1]


def config_with(pin_cores: str, *, learner: int = 0, actor: int = 0, num_ranks: int = 1) -> Config:
    return Config(
        run=Run.model_validate({"pin_cores": pin_cores}),
        learner=Learner.model_validate({"num_threads": learner, "num_ranks": num_ranks}),
        actor=Actor.model_validate({"num_threads": actor}),
    )


def names(count: int) -> list[str]:
    return [f"actor-{index}" for index in range(count)]


shapes = st.fixed_dictionaries(
    {"learner": st.integers(0, 4), "actor": st.integers(0, 4), "num_ranks": st.integers(1, 2)}
)


@unhurried
@given(shape=shapes, num_cores=st.integers(1, 32), num_peers=st.integers(0, 5))
def test_auto_pins_only_where_every_thread_finds_a_core_of_its_own(
    shape: dict[str, int], num_cores: int, num_peers: int
) -> None:
    shares = share_cores(range(num_cores), config_with("auto", **shape), names(num_peers))
    threads = {"learner": shape["learner"] * shape["num_ranks"], **dict.fromkeys(names(num_peers), shape["actor"])}
    if 0 in threads.values() or sum(threads.values()) > num_cores:
        assert shares == {}
        return
    common = frozenset.intersection(*shares.values()) if num_peers else frozenset[int]()
    assert set(shares) == set(threads)
    assert frozenset.union(*shares.values()) == frozenset(range(num_cores))
    for name, own in shares.items():
        assert len(own) >= threads[name]
        assert all(own & other <= common for rival, other in shares.items() if rival != name)


@unhurried
@given(shape=shapes, num_cores=st.integers(2, 32), num_peers=st.integers(1, 5))
def test_split_keeps_the_learner_and_the_others_apart(shape: dict[str, int], num_cores: int, num_peers: int) -> None:
    shares = share_cores(range(num_cores), config_with("split", **shape), names(num_peers))
    assert all(shares.values())
    assert set(shares) == {"learner", *names(num_peers)}
    assert frozenset.union(*shares.values()) == frozenset(range(num_cores))
    spare = frozenset.intersection(*shares.values())
    assert len(spare) < num_peers
    for name in names(num_peers):
        assert not shares["learner"] & shares[name] - spare


@pytest.mark.parametrize("pin_cores", ["auto", "none"])
def test_the_demo_on_two_cores_pins_nobody(pin_cores: str) -> None:
    """Its learner has two threads, and actors that idle most of the time."""
    demo = resolve_config(ROOT / "deploy/recipes/demo.toml", [f"run.pin_cores={pin_cores}"]).config
    assert share_cores([0, 1], demo, [*names(2), "evaluator"]) == {}


def test_two_processes_of_one_thread_each_get_a_core_each_on_two_cores() -> None:
    shares = share_cores([3, 7], config_with("auto", learner=1, actor=1), names(1))
    assert describe_cores(shares) == "learner 3, actor-0 7"


def test_on_too_few_cores_a_split_leaves_the_rest_to_all_others() -> None:
    shares = share_cores([0, 1], config_with("split", learner=2, actor=1), [*names(2), "evaluator"])
    assert describe_cores(shares) == "learner 0, actor-0 1, actor-1 1, evaluator 1"


def test_one_core_alone_is_everybodys() -> None:
    assert share_cores([0], config_with("split", learner=1, actor=1), names(2)) == {}


def test_a_component_runs_on_its_cores_from_the_first_moment_with_all_that_it_starts(tmp_path: Path) -> None:
    own, before = frozenset({max(os.sched_getaffinity(0))}), os.sched_getaffinity(0)
    ask = "import os; print(*os.sched_getaffinity(0), flush=True)"
    script = f"{ask}\nimport subprocess, sys\nsubprocess.run([sys.executable, '-c', {ask!r}], check=True)"
    component = Component("learner", [sys.executable, "-c", script], tmp_path / "log", cores=own)
    component.start(0.0)
    assert component.process
    assert component.process.wait(timeout=30) == 0
    assert (tmp_path / "log").read_text().split() == [str(*own)] * 2
    assert os.sched_getaffinity(0) == before
    component.signs.close()


def test_cores_that_cannot_be_had_leave_everything_as_it_was() -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(OSError, match="Invalid argument"), handing_down(frozenset({100_000})):
        pytest.fail("nothing is started where its cores are not there")
    assert os.sched_getaffinity(0) == before
