"""Takes one run: demonstrations, chord-local, chord-eval on what it leaves, and the result of all that.

Everything is done by the commands that users have, with a configuration file that is kept beside the result and says
how to repeat the run by hand.
"""

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.config.load import to_toml
from common.wire.ports import free_ports
from tests.compare.commands import CommandFailed, last_line, require_success, run_command, started
from tests.compare.entropy import TOLD
from tests.compare.plan import SUPERVISED, PlannedRun, Sections
from tests.compare.results import Result, Score
from tests.compare.scale import Scale
from tests.compare.tables import table, task_hash, write_family, write_tables
from tests.compare.task import READING, TEMPERATURE, Family
from tests.runs import read_lines

POLL_S = 1.0
RUN_S = 3600.0
"""Longest run; whatever takes longer hangs."""
COMMAND_S = 1200.0
"""Longest evaluation or import."""
CURVES = (
    "reward_mean", "policy_entropy", "answer_tokens_mean", "expert_nll_mean", "mu", "grad_norm", "policy_mismatch_kl",
    "staleness_mean", "staleness_max",
)  # fmt: skip
Show = Callable[[str], None]


@dataclass(frozen=True)
class Harness:
    """Takes runs of one scale, one at a time."""

    scale: Scale
    scratch: Path
    """Where runs take place; little is left of them."""
    configs: Path
    """Where each run's configuration is kept."""
    show: Show = lambda _: None
    """Called with what happens now, again and again."""

    def take(self, run: PlannedRun) -> Result:
        """Raises CommandFailed, or KeyboardInterrupt once all that was started has ended."""
        config, scale = self.write_config(run), self.scale
        folder, started = self.run_folder(run), time.monotonic()
        write_tables(
            self.tables, run.seed, num_expert_rows=scale.num_expert_rows,
            num_validation=scale.num_validation_problems, num_test=scale.num_test_problems,
        )  # fmt: skip
        if run.is_trained:
            self._import_demonstrations(config)
            self._train(run, config)
        trained, policy = time.monotonic(), self._policy(run)
        result = Result(run.name, run.part, run.label, run.seed, run.lr, run.settings_hash, provenance=_provenance())
        kept_step = kept_version(folder) if run.label in SUPERVISED else run.num_steps
        if run.is_trained:
            result = replace(result, kept_step=kept_step, **what_it_left(folder))
        result = replace(result, **self._measure(run, config, policy))
        walls = {"run": trained - started, "evaluation": time.monotonic() - trained}
        self._clean(folder)
        return replace(result, wall_s=walls)

    def run_folder(self, run: PlannedRun) -> Path:
        return self.scratch / run.name

    def write_config(self, run: PlannedRun) -> Path:
        """Its configuration file, with the commands that repeat it at the top."""
        assert run.sections, f"{run.name}: taken before its learning rate was chosen"
        sections = {name: dict(keys) for name, keys in run.sections.items()}
        sections["run"]["dir"] = str(self.run_folder(run))
        sections["expert"]["path"] = str(self.tables / "expert.sqlite")
        sections["environment"]["options"] = self._options(run.seed, "validation")
        self.configs.mkdir(parents=True, exist_ok=True)
        path = self.configs / f"{run.name}.toml"
        named = Path(os.path.relpath(path))
        path.write_text(_recipe(run, named, self.tables, self.scale) + _toml_document(sections))
        return path

    @property
    def tables(self) -> Path:
        """Of questions and demonstrations; other tasks, and other numbers of rows, have another folder."""
        return self.scratch / f"tables-{task_hash(self.scale.num_expert_rows)}"

    def _options(self, seed: int, held_out: str) -> dict[str, str]:
        """Of the environment: what is trained on is never held out."""
        return {
            "source": str(table(self.tables, "prompts", seed)),
            "held_out_source": str(table(self.tables, held_out, seed)),
            **READING,
        }

    def _import_demonstrations(self, config: Path) -> None:
        """Rows that the store holds already are left out; one store serves all runs."""
        self.show("importing demonstrations")
        rows = self.tables / "demonstrations.jsonl"
        self._run("learner.expert", "import", "jsonl", str(rows), "--config", str(config))

    def _train(self, run: PlannedRun, config: Path) -> None:
        """chord-local, and beside it the actor that lags, where one is to."""
        folder = self.run_folder(run)
        port = free_ports(1, "127.0.0.1")[0]
        arguments = ["--config", str(config), f"network.port={port}"]
        log = self.scratch / f"{run.name}.log"
        with ExitStack() as running:
            local = running.enter_context(started("common.local", "--fresh", *arguments, log=log))
            actor = None
            if run.lag is not None:
                lagging = started("tests.compare.lagging", f"--lag={run.lag}", *arguments, log=_beside(log))
                actor = running.enter_context(lagging)
            self._follow(folder, local, actor, log, num_steps=run.num_steps)
        require_success("chord-local", local, log)

    def _follow(
        self, folder: Path, local: subprocess.Popen[bytes], actor: subprocess.Popen[bytes] | None, log: Path, *,
        num_steps: int,
    ) -> None:  # fmt: skip
        deadline = time.monotonic() + RUN_S
        while local.poll() is None:
            done = len(read_lines(folder / "metrics.jsonl"))
            self.show(f"step {done}/{num_steps}" if done else "starting")
            if time.monotonic() > deadline:
                raise CommandFailed(f"chord-local went on for {RUN_S:.0f} s, expected its end (log: {log})")
            if actor and actor.poll():
                raise CommandFailed(f"the lagging actor ended with {actor.returncode}: {last_line(_beside(log))}")
            time.sleep(POLL_S)

    def _policy(self, run: PlannedRun) -> Path:
        """The folder of the policy that is tested."""
        if not run.is_trained:
            return self.scale.model
        folder = self.run_folder(run)
        return export_kept(folder, self.scale.model) if run.label in SUPERVISED else folder / "final"

    def _measure(self, run: PlannedRun, config: Path, policy: Path) -> dict[str, Any]:
        """Test, retention (of the methods) and entropy, as fields of the result."""
        folder = self.run_folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        samples = folder / "test-samples.jsonl"
        self.show("testing")
        problems = table(self.tables, "test", run.seed)
        test = self._evaluate(
            policy, samples, "--config", str(config), *asked_in_test(problems, self.scale)
        )  # fmt: skip
        retention = {}
        for family in self.scale.families if run.part == "methods" else ():
            self.show(f"retention: {family.name}")
            answers = folder / f"retention-{family.name}.jsonl"
            retention[family.name] = self._evaluate(policy, answers, *self._asked(family, run.seed))
        self.show("entropy")
        told = self._run(
            "tests.compare.entropy", str(policy), str(samples), str(problems),
            "--num-answers", str(self.scale.num_entropy_answers),
        )  # fmt: skip
        return {"test": test, "retention": retention, "entropy": float(told.rpartition(TOLD)[2].split()[0])}

    def _asked(self, family: Family, seed: int) -> list[str]:
        """How an untrained family is evaluated; a handful of short answers needs no engine that starts for long."""
        path = write_family(self.tables, family, seed, num=self.scale.num_retention_problems)
        return [
            "environment.name=math", f"environment.options={to_toml(self._options(seed, family.name))}",
            f"sampling.max_tokens={family.max_tokens}", f"eval.num_problems={len(read_lines(path))}",
            "eval.engine=transformers", f"actor.num_threads={self.scale.num_threads}", "actor.max_model_tokens=512",
        ]  # fmt: skip

    def _evaluate(self, policy: Path, samples: Path, *arguments: str) -> Score:
        """chord-eval's score of the policy's only task."""
        scores = samples.with_suffix(".scores.json")
        self._run(
            "actors.evaluator", "--model", str(policy), "--json", str(scores), "--samples", str(samples), *arguments
        )  # fmt: skip
        (task,) = json.loads(scores.read_text())["tasks"]
        return score_of(task, read_lines(samples))

    def _run(self, module: str, *arguments: str) -> str:
        return run_command(module, *arguments, log=self.scratch / f"{module}.log", limit_s=COMMAND_S)

    def _clean(self, folder: Path) -> None:
        """Weights and checkpoints go; what can be read stays."""
        for name in ("checkpoints", "final", "weights", "sft", "tested", "ledger.bodies"):
            shutil.rmtree(folder / name, ignore_errors=True)


def what_it_left(folder: Path) -> dict[str, Any]:
    """Fields of the result that the run directory tells."""
    steps = read_lines(folder / "metrics.jsonl")
    scored = sorted(read_lines(folder / "eval.jsonl"), key=lambda line: line["step"])
    curves = {key: [line.get(key) for line in steps] for key in CURVES}
    sampled = sum(line["actor_tokens_per_s"] * line["step_s"] for line in steps)
    return {
        "validation": {key: [line[key] for line in scored] for key in ("step", "accuracy")},
        "curves": {key: values for key, values in curves.items() if values.count(None) < len(values)},
        "budget": {
            "steps": len(steps),
            "expert_rows": sum(line["num_expert_rows"] for line in steps),
            "answers": sum(line["num_trajectories"] for line in steps),
            "tokens_sampled": round(sampled),
            "policy_tokens": sum(line["num_policy_tokens"] for line in steps),
            "expert_tokens": sum(line["num_expert_tokens"] for line in steps),
        },
    }


def kept_version(folder: Path) -> int:
    """The supervised version whose policy is tested: the best that was evaluated, the later of equals.

    As a handover to reinforcement learning chooses it; the run has kept its file.
    """
    accuracies = {line["step"]: line["accuracy"] for line in read_lines(folder / "eval.jsonl")}
    kept = {int(path.stem) for path in (folder / "sft").glob("*.safetensors")}
    candidates = accuracies.keys() & kept
    if not candidates:
        raise CommandFailed(f"{folder}: got no evaluated policy in sft/, expected the best of them")
    return max(candidates, key=lambda step: (accuracies[step], step))


def export_kept(folder: Path, model: Path) -> Path:
    """The kept policy as a Hugging Face folder."""
    from common.weights.snapshot import read_snapshot
    from learner.final import export_policy

    step = kept_version(folder)
    path = folder / "sft" / f"{step:08d}.safetensors"
    snapshot = read_snapshot(path, run_id="compare", incarnation=1, step=step, chunk_bytes=2 << 20)
    export_policy(snapshot, base=model, destination=folder / "tested")
    return folder / "tested"


def asked_in_test(problems: Path, scale: Scale) -> list[str]:
    """chord-eval's overrides for the test."""
    return [
        f"environment.options.held_out_source={problems}", f"eval.num_problems={scale.num_test_problems}",
        f"eval.samples_per_problem={scale.num_test_answers}", f"eval.temperature={TEMPERATURE}",
    ]  # fmt: skip


def score_of(task: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Score:
    """From a task's line of chord-eval's document, and its samples."""
    right: dict[int, int] = {}
    for sample in samples:
        right[sample["problem"]] = right.get(sample["problem"], 0) + sample["is_correct"]
    return Score(
        num_problems=task["num_problems"],
        k=task["samples_per_problem"],
        accuracy=task["accuracy"],
        reward=task["mean_score"],
        answer_tokens=task["mean_answer_tokens"],
        truncated_frac=task["num_truncated"] / len(samples),
        num_right="".join(str(right[problem]) for problem in sorted(right)),
    )


def _toml_document(sections: Sections) -> str:
    return "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {to_toml(value)}\n" for key, value in keys.items())
        for name, keys in sections.items()
    )


def _recipe(run: PlannedRun, path: Path, tables: Path, scale: Scale) -> str:
    """How to repeat the run by hand, as comments."""
    told = [
        f"{run.name}: a run of `make compare`, by hand:",
        f"python -m tests.compare.tables {tables} {run.seed} {scale.num_expert_rows} "
        f"{scale.num_validation_problems} {scale.num_test_problems}",
        f"chord-expert import jsonl {tables / 'demonstrations.jsonl'} --config {path}",
    ]
    if run.lag is None and run.is_trained:
        told.append(f"chord-local --fresh --config {path}")
    elif run.is_trained:
        told += [
            f"chord-local --fresh --config {path} network.port=5757 &",
            f"python -m tests.compare.lagging --lag {run.lag} --config {path} network.port=5757",
        ]
    test = " ".join(asked_in_test(table(tables, "test", run.seed), scale))
    told.append(f"chord-eval --model POLICY --config {path} {test}")
    told.append("POLICY: final/ in run.dir; of sft and dft the best in sft/, as a folder; of start model.path")
    return "".join(f"# {line}\n" for line in told) + "\n"


def _provenance() -> dict[str, Any]:
    described = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(described, capture_output=True, text=True, check=False)
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit.stdout.strip(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
    }


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _beside(log: Path) -> Path:
    """The log of the actor that lags."""
    return log.with_suffix(".actor.log")
