"""`make compare` without a run: plan and budgets, what is skipped, and what is made of results, here invented ones."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from common.config.load import resolve_config
from common.config.schema import Config
from learner.schedule import mu_of
from tests.compare.__main__ import Session, estimate
from tests.compare.commands import CommandFailed
from tests.compare.harness import Harness, kept_version, score_of
from tests.compare.plan import METHODS, START, PlannedRun, fresh, make_plan
from tests.compare.results import Result, Score, load_results, write_result
from tests.compare.scale import Scale
from tests.compare.table import BEGIN, END, FIGURE
from tests.compare.tables import NUM_PROMPTS, table, worked_solution, write_tables
from tests.compare.task import TRAINED
from tests.runs import read_lines

EXPERT, POLICY, BOTH = (1.5e-4, 5e-5, 5e-4), (2e-5, 5e-6, 6e-5), (6e-5, 2e-5, 1.5e-4)
SCALE = Scale(
    rates={
        "sft": EXPERT, "dft": EXPERT, "grpo": POLICY, "sft_then_rl": POLICY, "chord_mu": BOTH, "chord_phi": BOTH
    }
)  # fmt: skip
TABLES = ("prompts", "validation", "test")
LAG_STEPS = SCALE.lag_sft_steps + SCALE.num_steps
ACCURACY = {START: 0.1, "sft": 0.5, "grpo": 0.3, "sft_then_rl": 0.6, "dft": 0.4, "chord_mu": 0.65, "chord_phi": 0.55}


def invent(run: PlannedRun, *, offset: float = 0.0) -> Result:
    """A finished run: the larger its seed, the better; learning rates are best in the middle of the grid."""
    rates = sorted(SCALE.rates.get(run.label, (0.0,)))
    penalty = 0.02 * abs(rates.index(run.lr) - 1) if run.part == "methods" and run.lr else 0.0
    accuracy = ACCURACY.get(run.label, 0.3) + 0.01 * run.seed - penalty + offset
    last = run.num_steps if run.is_trained else 0
    num_right = "".join(str(int(4 * accuracy + problem / 200)) for problem in range(200))
    score = Score(200, 4, sum(map(int, num_right)) / 800, accuracy, 20.0, 0.01, num_right)
    return Result(
        run.name, run.part, run.label, run.seed, run.lr, run.settings_hash,
        validation={"step": [0, 10, last], "accuracy": [0.1, 0.2, accuracy]} if run.is_trained else {},
        kept_step=last,
        test=score,
        retention={"gcd": replace(score, accuracy=0.3), "syllogism": replace(score, accuracy=0.5)},
        entropy=0.4,
        curves={name: [None] * 10 + [run.lag] * 40 for name in ("staleness_mean", "staleness_max")} if run.lag else {},
        budget={"steps": last, "expert_rows": 640, "answers": 1920, "tokens_sampled": 40000} if run.is_trained else {},
        wall_s={"run": 400.0, "evaluation": 100.0},
        provenance={"at": "now", "commit": "abc", "processor": "a processor", "cores": 2},
    )  # fmt: skip


def invent_all(folder: Path, *, limit: int = 1000) -> None:
    """As the session goes: the plan is made anew after every result."""
    for _ in range(limit):
        results = load_results(folder)
        run = next((run for run in make_plan(SCALE, results) if run.is_ready and not fresh(run, results)), None)
        if run is None:
            return
        write_result(folder, invent(run))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    invent_all(folder)
    return folder


def configs(folder: Path) -> Iterator[tuple[PlannedRun, Config]]:
    """Every run of the finished plan that trains, with its configuration as chord-local resolves it."""
    harness = Harness(SCALE, Path("runs/compare"), folder / "configs")
    for run in make_plan(SCALE, load_results(folder)):
        if run.is_trained:
            yield run, resolve_config(harness.write_config(run)).config


def test_a_finished_comparison_has_every_method_lag_and_seed(finished: Path) -> None:
    runs = make_plan(SCALE, load_results(finished))
    assert len({run.name for run in runs}) == len(runs)
    for method in METHODS:
        assert {run.seed for run in runs if run.label == method} >= {0, 1, 2}
    for label in ("tis lag 0", "tis lag 1", "tis lag 4", "tis lag 8", "none lag 1", "none lag 4", "none lag 8"):
        assert {run.seed for run in runs if run.label == label} >= {0, 1, 2}


def test_budgets_are_equal_by_the_configurations_that_are_run(finished: Path) -> None:
    budgets: dict[str, tuple[int, int, int]] = {}
    for run, config in configs(finished):
        mus = [mu_of(config, step, mean_reward=None) for step in range(config.learner.num_steps)]
        rows = sum(mu > 0 for mu in mus) * config.expert.rows_per_step
        answers = sum(mu < 1 for mu in mus) * config.learner.groups_per_step * config.algorithm.group_size
        found = len(mus), rows, answers
        assert budgets.setdefault(run.label, found) == found, "alike for every seed and learning rate"
        assert config.sampling.max_tokens == TRAINED.max_tokens
    steps, rows, answers = SCALE.num_steps, SCALE.num_steps * SCALE.rows_per_step, SCALE.num_steps * 48
    assert {budgets[method] for method in ("sft", "dft")} == {(steps, rows, 0)}
    assert {budgets[method] for method in ("sft_then_rl", "chord_mu", "chord_phi")} == {(steps, rows, answers)}
    assert budgets["grpo"] == (steps, 0, answers)
    assert {budgets[label] for label in budgets if "lag" in label} == {(LAG_STEPS, 10 * SCALE.rows_per_step, answers)}


def test_methods_differ_in_nothing_but_what_they_are(finished: Path) -> None:
    own = {"preset", "sft_steps", "sft_ends_with", "mu_decay_steps", "mu_peak", "mu_valley", "expert_weighting"}
    seen = {
        json.dumps([
            config.algorithm.model_dump(exclude=own), config.sampling.model_dump(), config.environment.name,
            config.actor.model_dump(mode="json"), config.eval.model_dump(mode="json"),
            config.learner.model_dump(exclude={"lr", "lr_after_sft", "groups_per_step"}),
        ])
        for run, config in configs(finished) if run.part == "methods"
    }  # fmt: skip
    assert len(seen) == 1


def test_lagging_runs_differ_in_lag_and_correction_only(finished: Path) -> None:
    kept = {
        (config.algorithm.correction, config.algorithm.max_staleness, run.lag)
        for run, config in configs(finished) if run.part == "staleness"
    }  # fmt: skip
    assert kept == {("tis", 0, 0)} | {(kind, lag, lag) for kind in ("tis", "none") for lag in (1, 4, 8)}
    assert len({config.learner.lr for run, config in configs(finished) if run.part == "staleness"}) == 1


def test_every_method_has_as_many_tries_and_validation_chooses(finished: Path) -> None:
    results = load_results(finished)
    runs = make_plan(SCALE, results)
    for method in METHODS:
        tried = [run.lr for run in runs if (run.label, run.seed) == (method, 0)]
        assert sorted(tried) == sorted(SCALE.rates[method])
        assert {run.lr for run in runs if run.label == method and run.seed > 0} == {sorted(SCALE.rates[method])[1]}


def test_the_choice_of_a_rate_waits_until_all_were_tried_and_counts_a_failure_as_worst(tmp_path: Path) -> None:
    tried = [run for run in make_plan(SCALE, {}) if run.label == "grpo" and run.seed == 0]
    for run in tried[:2]:
        write_result(tmp_path, invent(run))
    later = [run for run in make_plan(SCALE, load_results(tmp_path)) if run.label == "grpo" and run.seed == 1]
    assert not later[0].is_ready
    failed = Result(tried[2].name, "methods", "grpo", 0, tried[2].lr, tried[2].settings_hash, failure="diverged")
    write_result(tmp_path, failed)
    later = [run for run in make_plan(SCALE, load_results(tmp_path)) if run.label == "grpo" and run.seed == 1]
    assert later[0].lr == tried[0].lr


def test_a_seed_is_finished_before_the_next_begins(finished: Path) -> None:
    runs = make_plan(SCALE, load_results(finished))
    methods = [run.seed for run in runs if run.part == "methods" and run.is_trained]
    assert methods == sorted(methods)
    lagged = [run.seed for run in runs if run.part == "staleness"]
    assert lagged == sorted(lagged)


def test_a_result_of_other_settings_is_taken_anew(finished: Path) -> None:
    results = load_results(finished)
    assert all(fresh(run, results) for run in make_plan(SCALE, results))
    other = make_plan(replace(SCALE, num_test_problems=100), results)
    assert not any(fresh(run, results) for run in other)
    longer = make_plan(replace(SCALE, num_steps=60), results)
    assert not any(fresh(run, results) for run in longer)


def test_results_survive_being_written_and_read(tmp_path: Path) -> None:
    run = make_plan(SCALE, {})[3]
    path = write_result(tmp_path, invent(run))
    assert load_results(tmp_path) == {run.name: invent(run)}
    assert path.stat().st_size < 8 << 10
    path.write_text('{"name": "half')
    with pytest.raises(ValueError, match=r"not a result of make compare"):
        load_results(tmp_path)


def make_session(folder: Path, results: Path) -> Session:
    (folder / "README.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return Session(SCALE, results, folder / "scratch", folder, Console(width=200))


def test_no_run_is_started_that_would_not_end_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = make_session(tmp_path, tmp_path / "results")
    assert session.take_runs(deadline=0.0) == 0
    assert "would not end in time" in capsys.readouterr().out
    assert not (tmp_path / "scratch").exists()


def test_the_time_a_run_takes_is_told_from_runs_of_its_kind(finished: Path) -> None:
    results = load_results(finished)
    runs = {run.label: run for run in make_plan(SCALE, results)}
    slow = {
        name: replace(result, wall_s={"run": 900.0}) for name, result in results.items() if result.label == "chord_mu"
    }
    assert estimate(runs["chord_mu"], results | slow) == 900.0
    assert estimate(runs["grpo"], results | slow) == 500.0
    assert estimate(runs["grpo"], slow) == 900.0  # none of its kind yet


def test_table_figure_and_document_are_made_of_whatever_is_there(tmp_path: Path) -> None:
    results = tmp_path / "compare" / "results"
    invent_all(results, limit=10)
    session = make_session(tmp_path, results)
    session.report()
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert "10 of 69 runs, 1.4 hours, on a processor, 2 cores." in readme
    assert "Not taken yet: 59" in readme
    assert "| `sft` | 1 | 0.00015 (of 3) | 0.500 | – | +0.200 ±" in readme
    assert "| `sft` | 40 | 640 | 1,920 | 40,000 |" in readme
    assert "*" in readme  # one seed: over problems
    assert FIGURE in readme
    document = json.loads((tmp_path / "compare" / "compare.json").read_text())
    assert (document["num_done"], len(document["missing"])) == (10, 59)
    assert_is_a_picture(tmp_path / FIGURE)


def test_a_finished_comparison_says_so_and_holds_lags_against_the_bar(finished: Path, tmp_path: Path) -> None:
    results = tmp_path / "compare" / "results"
    results.mkdir(parents=True)
    for path in finished.glob("*.json"):
        (results / path.name).write_text(path.read_text())
    runs = {run.name: run for run in make_plan(SCALE, load_results(results))}
    for name, run in runs.items():
        if run.label == "none lag 8":  # an effect that is there must show
            write_result(results, invent(run, offset=-0.2))
        if name == "methods-dft-lr0.00015-seed2":
            failed = Result(name, "methods", "dft", 2, run.lr, run.settings_hash, failure="it went wrong")
            write_result(results, failed)
        if name == "staleness-tis-lag-1-seed2":
            failed = Result(name, "staleness", run.label, 2, run.lr, run.settings_hash, failure="it went wrong")
            write_result(results, failed)
        if name == "staleness-tis-lag-8-seed1":
            write_result(results, replace(invent(run), earlier_failure="it hung"))
    session = make_session(tmp_path, results)
    session.report()
    readme = (tmp_path / "README.md").read_text()
    assert "69 of 69 runs" in readme
    assert "Failed twice, and in no mean: methods-dft-lr0.00015-seed2, staleness-tis-lag-1-seed2." in readme
    assert "Failed once and taken again: staleness-tis-lag-8-seed1." in readme
    assert "| `dft` | 2, 1 failed |" in readme
    assert "| `chord_mu` | 3 | 6e-05 (of 3) | 0.660 ± 0.017 |" in readme
    assert readme.index("| `chord_mu` | 2e-05 | ") < readme.index("| `chord_mu` | **6e-05** | ")
    tried = [line for line in readme.splitlines() if line.count(" | ") == 4 and line.startswith("| `")]
    assert len(tried) == sum(map(len, SCALE.rates.values()))
    rows = {row["label"]: row for row in json.loads((results.parent / "compare.json").read_text())["staleness"]}
    assert rows["tis lag 4"]["is_within_bar"] is True
    assert rows["tis lag 4"]["num_seeds"] == 8
    assert rows["tis lag 4"]["staleness_mean"]["mean"] == rows["tis lag 4"]["staleness_max"] == 4
    assert rows["tis lag 4"]["gain"]["mean"] == pytest.approx(0.135)  # of 0.30 to 0.37, over 0.2
    assert rows["tis lag 1"]["is_within_bar"] is None, "a seed of it failed"
    assert rows["none lag 8"]["against"]["mean"] == pytest.approx(-0.2)
    assert rows["none lag 8"]["is_within_bar"] is None  # the bar is on corrected lags up to 4
    assert rows["tis lag 8"]["is_within_bar"] is None
    first = (tmp_path / FIGURE).read_bytes()
    session.report()
    assert (tmp_path / FIGURE).read_bytes() == first


def assert_is_a_picture(path: Path) -> None:
    assert ElementTree.parse(path).getroot().tag.endswith("svg")
    assert path.stat().st_size > 10_000


def test_the_readme_of_this_repository_has_the_markers() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert readme.count(BEGIN) == readme.count(END) == 1


def test_no_question_is_in_two_tables_and_demonstrations_are_worked_out(tmp_path: Path) -> None:
    write_tables(tmp_path, 0, num_expert_rows=1000, num_validation=100, num_test=200)
    rows = read_lines(tmp_path / "demonstrations.jsonl")
    tables = {
        "expert": [row["prompt"] for row in rows],
        **{name: [row["question"] for row in read_lines(table(tmp_path, name, 0))] for name in TABLES},
    }
    assert {name: len(questions) for name, questions in tables.items()} == {
        "expert": 1000, "prompts": NUM_PROMPTS, "validation": 100, "test": 200
    }  # fmt: skip
    write_tables(tmp_path, 4, num_expert_rows=1000, num_validation=100, num_test=200)
    later = [row["question"] for name in TABLES[1:] for row in read_lines(table(tmp_path, name, 4))]
    everything = [question for questions in (*tables.values(), later) for question in questions]
    assert len(set(everything)) == len(everything)
    assert SCALE.num_steps * SCALE.groups_per_step + 9 * SCALE.groups_per_step <= NUM_PROMPTS
    for questions in tables.values():  # drawn alike
        assert np.mean([" + " in question for question in questions]) == pytest.approx(0.5, abs=0.15)
        assert np.mean([question.endswith("0 =") for question in questions]) == pytest.approx(0.1, abs=0.08)
    assert worked_solution("23 - 65") == ("23 - 60 = -37\n-37 - 5 = -42\nThe answer is -42.", -42)
    assert worked_solution("23 + 60") == ("23 + 60 = 83\nThe answer is 83.", 83)


def test_the_best_supervised_policy_is_the_one_that_a_handover_would_choose(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    for step in (10, 20, 30):
        (tmp_path / "sft" / f"{step:08d}.safetensors").touch()
    lines = [{"step": step, "accuracy": right} for step, right in ((0, 0.9), (10, 0.4), (20, 0.5), (30, 0.5))]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert kept_version(tmp_path) == 30  # version 0 was better still, but its file is gone
    (tmp_path / "eval.jsonl").unlink()
    with pytest.raises(CommandFailed, match="no evaluated policy"):
        kept_version(tmp_path)


def test_a_score_keeps_how_often_each_problem_was_solved() -> None:
    task = {
        "num_problems": 2, "samples_per_problem": 2, "accuracy": 0.75, "mean_score": 0.8, "mean_answer_tokens": 9.0,
        "num_truncated": 1,
    }  # fmt: skip
    samples = [{"problem": p, "sample": s, "is_correct": p == 1 or s == 0} for p in (1, 0) for s in (0, 1)]
    score = score_of(task, samples)
    assert (score.num_right, score.by_problem, score.truncated_frac) == ("12", [0.5, 1.0], 0.25)
