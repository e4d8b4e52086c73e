"""Evaluations: what one samples and scores, what the command says of a model, what a run with several tasks keeps."""

import asyncio
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from transformers import AutoTokenizer

from actors.engine import Answer, FinishReason, SamplingParameters
from actors.engines.simulated import SimulatedEngine
from actors.environment import Episode, Judgement, SingleTurn
from actors.environments.reasoning import ReasoningGym
from actors.evaluator.evaluate import Evaluation, Plan, seed_of
from actors.evaluator.metrics import EvaluatorMetrics
from actors.evaluator.progress import Progress
from actors.evaluator.samples import Sample
from actors.evaluator.scores import score_task
from actors.evaluator.tasks import EvaluationTask, make_tasks
from actors.guard import EngineGuard
from actors.rollout import Rollout
from common.chat import Chat, ChatMessage
from common.config.load import resolve_config
from common.config.schema import Actor
from common.errors import ConfigError, OperatorError
from common.local.progress import Progress as Shown
from common.local.progress import describe_evaluation, describe_summary
from common.local.record import EvaluationLine
from common.problems import Split
from common.run_dir import RunDir
from common.version import Version
from common.weights.snapshot import Snapshot
from common.wire.messages import MAX_CATEGORIES, TaskScore
from learner.publisher import MAX_OWED
from tests.runs import LocalRun, audit, import_experts, read_lines, read_summary, run_module, write_config
from tests.tiny_model import snapshot_of

LIMITS = Actor(max_model_tokens=256)  # pyright: ignore[reportCallIssue]
GREEDY = SamplingParameters(temperature=0.0, max_tokens=8)


class Echo(SingleTurn[int]):
    """Right is an answer that begins with the problem's number; one without any digit cannot be read."""

    def task(self, split: Split, index: int) -> tuple[int, Sequence[ChatMessage]]:
        return index, [ChatMessage(role="user", content=f"Say {index}")]

    def score(self, task: int, text: str) -> float:
        return self.judge(task, text, is_truncated=False).reward

    def judge(self, task: int, text: str, *, is_truncated: bool) -> Judgement:
        return Judgement(float(text.startswith(str(task))), is_parsed=any(c.isdigit() for c in text))

    def category(self, task: int) -> str:
        return "even" if task % 2 == 0 else "odd"


class ScriptedEngine:
    """Answers with what it was told to, in the order of the questions; remembers how it was asked."""

    name = "scripted"
    version: Version | None = None
    num_running = 0

    def __init__(self, model: Path, script: Sequence[str]) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._script = iter(script)
        self.asked: list[SamplingParameters] = []
        self.most_running = 0

    async def start(self) -> None: ...

    async def load(self, snapshot: Snapshot, *, in_flight: bool = True) -> None: ...

    async def sample(self, prompt: Sequence[int], sampling: SamplingParameters) -> Answer:
        self.asked.append(sampling)
        text = next(self._script)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        await asyncio.sleep(0.001)
        self.num_running -= 1
        tokens = np.array(self._tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)[: sampling.max_tokens]
        finish = FinishReason.LENGTH if len(tokens) == sampling.max_tokens else FinishReason.STOP
        zeros = np.zeros(len(tokens))
        return Answer(tokens, zeros.astype(np.float32), zeros.astype(np.int32), finish)

    async def probe(self) -> None: ...

    async def close(self) -> None: ...


def rollout_of(engine: object, model: Path, environment: SingleTurn[int]) -> Rollout:
    guard = EngineGuard(engine, LIMITS, CollectorRegistry())  # pyright: ignore
    return Rollout(guard, environment, Chat(model), LIMITS)


def run_plan(plan: Plan, engine: object, model: Path) -> tuple[tuple[TaskScore, ...], list[Sample], list[Progress]]:
    kept: list[Sample] = []
    shown: list[Progress] = []
    environment = plan.tasks[0].environment
    evaluation = Evaluation(plan, rollout_of(engine, model, environment), show=shown.append, keep=kept.extend)  # pyright: ignore
    scores = asyncio.run(asyncio.wait_for(evaluation.run(), 60))
    return scores, kept, shown


def test_every_task_gets_k_answers_to_each_problem_and_a_score_of_its_own(tiny_model: Path) -> None:
    echo = Echo()
    tasks = [EvaluationTask("first", echo, range(2)), EvaluationTask("second", echo, [3, 7], {3: "3", 7: "7"})]
    engine = ScriptedEngine(tiny_model, ["0", "x", "1", "1!", "7", "3", "7, and so on", "9"])
    plan = Plan(tasks, GREEDY, samples_per_problem=2, max_concurrency=1, seed=0)
    (first, second), kept, shown = run_plan(plan, engine, tiny_model)
    assert (first.task, first.num_problems, first.samples_per_problem) == ("first", 2, 2)
    assert (first.num_correct, first.accuracy, first.num_unparsed) == (3, 0.75, 1)
    assert first.pass_at_k == {"1": 0.75, "2": 1.0}
    assert first.categories == {"even": 0.5, "odd": 1.0}
    assert (second.num_correct, second.num_truncated, second.confidence_95) == (2, 1, (0.5, 0.5))
    assert [(one.task, one.problem, one.sample, one.gold) for one in kept[4:]] == [
        ("second", 3, 0, "3"), ("second", 3, 1, "3"), ("second", 7, 0, "7"), ("second", 7, 1, "7")
    ]  # fmt: skip
    assert (shown[0], shown[-1]) == (Progress("first", 1, 4), Progress("second", 4, 4))


def test_no_two_answers_have_a_seed_in_common_and_a_repetition_has_the_same_ones(tiny_model: Path) -> None:
    tasks = [EvaluationTask(name, Echo(), range(3)) for name in ("first", "second")]
    plan = Plan(tasks, GREEDY, samples_per_problem=4, max_concurrency=3, seed=5)
    engines = [ScriptedEngine(tiny_model, ["0"] * 24) for _ in range(2)]
    for engine in engines:
        run_plan(plan, engine, tiny_model)
    seeds = [[one.seed for one in engine.asked] for engine in engines]
    assert sorted(map(str, seeds[0])) == sorted(map(str, seeds[1]))
    assert len(set(seeds[0])) == 24
    assert all(engine.most_running == 3 for engine in engines)
    assert seed_of(5, "first", 0, 0) != seed_of(6, "first", 0, 0)


def test_a_repeated_evaluation_gives_the_same_answers(tiny_model: Path, tmp_path: Path) -> None:
    snapshot = snapshot_of(tiny_model, tmp_path / "weights.safetensors", step=0)

    async def run(seed: int) -> list[Sample]:
        chat = Chat(tiny_model)
        limits = Actor(max_model_tokens=256, tokens_per_s=1e5)  # pyright: ignore[reportCallIssue]
        engine = SimulatedEngine(actor=limits, vocab_size=chat.vocab_size, end_tokens=chat.end_tokens)
        await engine.load(snapshot)
        kept: list[Sample] = []
        plan = Plan([EvaluationTask("echo", Echo(), range(5))], GREEDY, 3, max_concurrency=4, seed=seed)
        await Evaluation(plan, rollout_of(engine, tiny_model, Echo()), keep=kept.extend).run()
        return kept

    first, second, other = (asyncio.run(run(seed)) for seed in (1, 1, 2))
    assert first == second
    assert [one.text for one in first] != [one.text for one in other]
    assert len({one.text for one in first}) > 10


def test_a_prompt_that_does_not_fit_is_told_in_one_line(tiny_model: Path) -> None:
    class Long(Echo):
        def task(self, split: Split, index: int) -> tuple[int, Sequence[ChatMessage]]:
            return index, [ChatMessage(role="user", content="long " * 100 * index)]

    plan = Plan([EvaluationTask("long", Long(), range(2))], GREEDY, 1, max_concurrency=1, seed=0)
    with pytest.raises(OperatorError, match=r"^long: problem 1: got a prompt of \d+ tokens, expected fewer than "):
        run_plan(plan, ScriptedEngine(tiny_model, ["0"] * 2), tiny_model)


def test_more_categories_than_a_message_takes_are_left_out() -> None:
    def samples(count: int) -> list[Sample]:
        return [Sample("t", n, 0, f"c{n}" * 40, "", "", "", 1.0, True, True, False, 1) for n in range(count)]

    full = score_task(samples(MAX_CATEGORIES), wall_s=0.0, seed=0).categories
    assert (len(full), max(map(len, full))) == (MAX_CATEGORIES, 64)
    assert score_task(samples(MAX_CATEGORIES + 1), wall_s=0.0, seed=0).categories == {}


def test_held_out_problems_come_first_and_their_name_is_theirs_alone() -> None:
    family = ["environment.options.family=leg_counting", "eval.num_problems=3"]
    tasks = make_tasks(resolve_config(None, [*family, 'eval.benchmarks=["reasoning_gym/leg_counting"]']).config)
    assert [(task.name, len(task.problems)) for task in tasks] == [
        ("leg_counting", 3), ("reasoning_gym/leg_counting", 3)
    ]  # fmt: skip
    few = ["environment.options.family=coin_flip", "eval.num_problems=100000"]
    with pytest.raises(
        OperatorError, match=r"eval\.num_problems: got 100000, expected as many as there are: coin_flip has only"
    ):
        make_tasks(resolve_config(None, few).config)
    with pytest.raises(ConfigError, match=r"environment: got none"):
        make_tasks(resolve_config(None, []).config)


def test_an_answer_that_a_family_cannot_read_counts_as_unreadable() -> None:
    async def judge(episode: Episode, text: str) -> tuple[float, bool]:
        turn = await episode.answer(text, is_truncated=False)
        return turn.reward, turn.is_parsed

    environment = ReasoningGym(seed=0, family="prime_factorization")
    assert asyncio.run(judge(environment.episode("held_out", 0), "I do not know")) == (0.0, False)


def test_metrics_are_told_by_task() -> None:
    metrics = EvaluatorMetrics()
    version = Version(run_id="run", incarnation=1, step=12, hash="ab")
    samples = [Sample("amc", n, 0, "", "", "", "", float(n), n == 1, n == 1, False, 1) for n in range(2)]
    metrics.observe(version, [score_task(samples, wall_s=2.0, seed=0)])
    said = generate_latest(metrics.registry).decode()
    assert 'chord_evaluation_accuracy_ratio{task="amc"} 0.5' in said
    assert 'chord_evaluation_unparsed_ratio{task="amc"} 0.5' in said
    assert "chord_evaluations_total 1.0" in said
    assert "chord_evaluation_seconds_total 2.0" in said


def line_of(task: str, step: int, *, k: int = 1) -> dict[str, object]:
    return {
        "step": step, "task": task, "num_problems": 4, "samples_per_problem": k, "num_correct": k, "accuracy": 0.25,
        "confidence_95": [0.0, 0.75], "wall_s": 3.0,
    }  # fmt: skip


def test_each_task_of_a_version_is_shown_once(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    shown = Shown(run_dir)
    lines = [json.dumps(line) + "\n" for line in (line_of("sums", 0), line_of("amc", 0, k=8))]
    run_dir.evaluations.write_text("".join(lines))
    assert shown.read_news() == [
        "accuracy of version 0 on sums: 0.250 [0.000, 0.750] (1 of 4 problems, 3 s)",
        "accuracy of version 0 on amc: 0.250 [0.000, 0.750] (8 of 32 answers to 4 problems, 3 s)",
    ]
    run_dir.evaluations.write_text(lines[0])  # a restarted learner writes it anew
    assert shown.read_news() == []
    run_dir.evaluations.write_text("".join([*lines, json.dumps(line_of("sums", 2)) + "\n"]))
    assert shown.read_news() == [describe_evaluation(EvaluationLine.model_validate(line_of("sums", 2)))]


def test_the_summary_sentence_tells_of_every_task_that_was_measured_at_both_ends() -> None:
    summary = {
        "eval_tasks": {"sums": {"before": 0.25, "after": 0.5}, "amc": {"before": 0.5, "after": 0.5},
                       "law": {"before": 0.5, "after": None}},
        "groups_by_actor": {}, "steps": 4, "wall_s": 60.0, "lost": 0, "duplicates": 0,
    }  # fmt: skip
    said = describe_summary(summary)
    assert said.startswith("Held-out accuracy on sums rose from 0.250 to 0.500. Held-out accuracy on amc stayed from")
    assert "law" not in said
    assert describe_summary({**summary, "eval_tasks": {}}).startswith("Held-out accuracy was not measured at both ends")


def write_gsm8k(path: Path, count: int) -> Path:
    rows = [{"question": f"What is {n} + 1?", "answer": f"Add.\n#### {n + 1}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_model_is_scored_on_a_benchmark_and_its_saved_answers_score_alike(tiny_model: Path, tmp_path: Path) -> None:
    benchmark = f"gsm8k={write_gsm8k(tmp_path / 'gsm8k.jsonl', 3)}"

    def evaluate(*arguments: str) -> dict[str, object]:
        done = run_module("actors.evaluator", *arguments, "--benchmark", benchmark, "--json", "-")
        return json.loads(done.stdout)

    sampling = ["eval.samples_per_problem=4", "eval.temperature=1", "eval.top_p=0.9", "eval.top_k=50"]
    model = ["--model", str(tiny_model), "actor.engine=transformers", "eval.max_tokens=12", *sampling]
    first, _ = (evaluate(*model, "--samples", str(tmp_path / f"{number}.jsonl")) for number in range(2))
    assert first["sampling"] == {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "max_tokens": 12}
    lines = read_lines(tmp_path / "0.jsonl")
    assert lines == read_lines(tmp_path / "1.jsonl")
    assert len({line["text"] for line in lines}) > 6
    assert {line["gold"] for line in lines} == {"1", "2", "3"}
    assert all(f"What is {line['problem']} + 1?" in line["question"] for line in lines)
    judged = tmp_path / "judged.jsonl"
    document = evaluate("--answers", str(tmp_path / "0.jsonl"), "--samples", str(judged))
    assert read_lines(judged) == lines
    (scored,), (again,) = first["tasks"], document["tasks"]  # pyright: ignore
    assert (scored["task"], scored["num_problems"], scored["samples_per_problem"]) == ("gsm8k", 3, 4)
    assert list(scored["pass_at_k"]) == ["1", "2", "4"]
    assert 0 < scored["mean_answer_tokens"] <= 12
    assert {**scored, "wall_s": 0.0} == again


@pytest.mark.parametrize(
    "mistake", [["gsm8k=gone.jsonl"], ["gsm8k={gsm8k}", "actor.max_model_tokens=17", "sampling.max_tokens=16"]]
)
def test_a_mistake_leaves_the_samples_of_an_earlier_evaluation(
    mistake: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    samples, gsm8k = tmp_path / "samples.jsonl", write_gsm8k(tmp_path / "gsm8k.jsonl", 1)
    samples.write_text("kept\n")
    benchmark, *overrides = [word.format(gsm8k=gsm8k) for word in mistake]
    model = ["--model", str(tiny_model), "actor.engine=transformers", "eval.max_tokens=16", *overrides]
    done = run_module("actors.evaluator", *model, "--benchmark", benchmark, "--samples", str(samples), check=False)
    assert (done.returncode, samples.read_text()) == (2, "kept\n"), done.stderr


def test_a_run_evaluates_every_task_of_every_version_once_and_keeps_the_answers(
    tiny_model: Path, tmp_path: Path
) -> None:
    benchmark = f"gsm8k={write_gsm8k(tmp_path / 'gsm8k.jsonl', 4)}"
    config = write_config(
        tmp_path, tiny_model, run={"num_actors": 1}, algorithm={"preset": "chord_phi"}, learner={"num_steps": 2},
        eval={"every_steps": 2, "num_problems": 3, "benchmarks": [benchmark], "samples_per_problem": 2,
              "temperature": 1.0, "top_p": 0.95, "save_samples": True},
    )  # fmt: skip
    import_experts(config)
    with LocalRun(config) as run:
        run.finish()
    lines = read_lines(run.folder / "eval.jsonl")
    assert [(line["step"], line["task"], line["num_problems"], line["samples_per_problem"]) for line in lines] == [
        (0, "chain_sum", 3, 2), (0, "gsm8k", 4, 2), (2, "chain_sum", 3, 2), (2, "gsm8k", 4, 2)
    ]  # fmt: skip
    for line in lines:
        assert line["accuracy"] == line["num_correct"] / (2 * line["num_problems"])
    samples = [read_lines(run.folder / "samples" / f"step-{step:08d}.jsonl") for step in (0, 2)]
    assert [len(one) for one in samples] == [14, 14]
    assert sum(one["is_correct"] for one in samples[0]) == lines[0]["num_correct"] + lines[1]["num_correct"]
    summary = read_summary(run.folder)
    assert list(summary["eval_tasks"]) == ["chain_sum", "gsm8k"]
    assert summary["eval_before"] == lines[0]["accuracy"]
    assert summary["eval_after"] == lines[2]["accuracy"]
    assert audit(run.folder)["violations"] == []


def test_training_waits_for_no_evaluator_and_what_it_still_owes_is_of_the_version_it_names(
    tiny_model: Path, tmp_path: Path
) -> None:
    num_steps = 12
    config = write_config(
        tmp_path, tiny_model, run={"num_actors": 1, "watchdog_s": 120.0},
        actor={"engine": "simulated", "tokens_per_s": 40.0}, learner={"num_steps": num_steps},
        algorithm={"preset": "grpo"}, eval={"every_steps": 1, "num_problems": 4},
    )  # fmt: skip
    with LocalRun(config) as run:
        run.wait_until(lambda: run.num_steps_done() >= 1 and "evaluator" in run.components())
        evaluator = run.components()["evaluator"]
        evaluator.suspend()
        run.wait_until(lambda: run.num_steps_done() == num_steps)
        assert evaluator.status() == psutil.STATUS_STOPPED
        num_before = len(read_lines(run.folder / "eval.jsonl"))
        evaluator.resume()
        run.finish()
    lines = read_lines(run.folder / "eval.jsonl")
    assert num_before < len(lines) <= num_before + MAX_OWED + 1, "expected what was owed, and the last version"
    assert lines[-1]["step"] == num_steps
    assert (
        "is not evaluated: the evaluator is 3 evaluations behind" in (run.folder / "logs" / "learner.log").read_text()
    )
    with sqlite3.connect(run.folder / "ledger.sqlite") as database:
        hashes = dict(database.execute("SELECT step, hash FROM versions"))
    assert {line["step"]: line["version_hash"] for line in lines} == {
        line["step"]: hashes[line["step"]] for line in lines
    }
    assert audit(run.folder)["violations"] == []
