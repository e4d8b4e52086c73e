"""What chord-local shows: read from the run directory alone, so that it shows what is on record."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from common.run_dir import RunDir

Line = dict[str, Any]
DAMAGE = (KeyError, TypeError, ValueError)
"""What a line raises where a bit of it flipped on disk; the learner writes its files anew when it starts."""


@dataclass
class Tail:
    """The complete lines of a growing JSONL file that were not seen yet."""

    path: Path
    offset: int = 0

    def read(self) -> list[Line]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            if file.seek(0, 2) < self.offset:
                self.offset = 0  # the file was written anew after a crash
            file.seek(self.offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self.offset += len(complete)
        return [line for text in complete.splitlines() if (line := _parse(text))]


class Progress:
    """Steps, evaluations and the learner's status board."""

    def __init__(self, run_dir: RunDir) -> None:
        self._status_path = run_dir.status
        self._steps = Tail(run_dir.metrics)
        self._evaluations = Tail(run_dir.evaluations)
        self.status: Line = {}
        self.last_step: Line = {}
        self.last_evaluation: Line = {}
        self._seen: set[tuple[str, int, str]] = set()
        """Kind, step and task of the lines shown."""
        self._joined: set[str] = set()
        self._num_poisoned = 0

    def read(self) -> list[str]:
        """One line of text for each newcomer, step and evaluation since the last call."""
        self.status = _read_json(self._status_path) or self.status
        texts = self._newcomers() + self._poisoned()
        for line in self._new("step", self._steps.read()):
            with suppress(*DAMAGE):
                texts.append(describe_step(line, num_steps=self.status.get("num_steps", 0)))
                self.last_step = line
        for line in self._new("evaluation", self._evaluations.read()):
            with suppress(*DAMAGE):
                texts.append(describe_evaluation(line))
                self.last_evaluation = line
        return texts

    def _poisoned(self) -> list[str]:
        """A line when a prompt was given up."""
        count = self.status.get("dropped", {}).get("poison", 0)
        before, self._num_poisoned = self._num_poisoned, count
        return [f"{count} prompts were given up as poison so far: see the learner's log"] if count > before else []

    def _newcomers(self) -> list[str]:
        fresh = [peer for peer in self.status.get("peers", []) if peer["peer_id"] not in self._joined]
        self._joined |= {peer["peer_id"] for peer in fresh}
        return [f"{peer['peer_id']} joined: it samples with the {peer['engine']} engine" for peer in fresh]

    def _new(self, kind: str, lines: list[Line]) -> list[Line]:
        """Lines of steps, and of tasks, not shown yet: a restarted learner writes its files anew."""
        lines = [line for line in lines if isinstance(line.get("step"), int)]
        named = [(kind, line["step"], str(line.get("task", ""))) for line in lines]
        fresh = [line for name, line in zip(named, lines, strict=True) if name not in self._seen]
        self._seen |= set(named)
        return fresh

    def now(self) -> str:
        """What happens at this moment, and who waits for whom."""
        if not self.status:
            return "the learner starts (loading libraries)"
        peers = ", ".join(describe_peer(peer) for peer in self.status["peers"]) or "no actor has joined yet"
        waiting = f", waits for {self.status['waiting_for']}" if self.status["waiting_for"] else ""
        idle = f"; {describe_idle(self.last_step)}" if self.last_step else ""
        return f"learner: {self.status['phase']} after step {self.status['step']}{waiting}; {peers}{idle}"


def describe_step(line: Line, *, num_steps: int) -> str:
    parts = [f"step {line['step']}/{num_steps}"]
    if line["num_groups"]:
        parts += [
            f"reward {line['reward_mean']:.3f}",
            f"signal {line['groups_with_signal_frac']:.0%}",
            f"staleness {line['staleness_mean']:.1f} (max {line['staleness_max']})",
        ]
    parts.append(f"μ {line['mu']:.3f}")
    if line["num_expert_tokens"]:
        parts.append(f"expert nll {line['expert_nll_mean']:.3f}")
    parts += [
        f"tokens/s sampled {line['actor_tokens_per_s']:.0f} trained {line['learner_tokens_per_s']:.0f}",
        describe_idle(line),
        f"{line['step_s']:.1f} s",
    ]
    return "  ".join(parts)


def describe_idle(line: Line) -> str:
    """Who waited for whom, in a step or in the whole run."""
    shares = {"learner": line["learner_wait_frac"], "actors": line["actor_idle_frac"]}
    return "idle: " + " ".join(f"{who} {share:.0%}" for who, share in shares.items() if share is not None)


def describe_evaluation(line: Line) -> str:
    low, high = line["confidence_95"]
    num_answers = line["num_problems"] * line["samples_per_problem"]
    answers = "" if num_answers == line["num_problems"] else f"{num_answers} answers to "
    return (
        f"accuracy of version {line['step']} on {line['task']}: {line['accuracy']:.3f} [{low:.3f}, {high:.3f}] "
        f"({line['num_correct']} of {answers}{line['num_problems']} problems, {line['wall_s']:.0f} s)"
    )


def describe_peer(peer: Line) -> str:
    version = peer["serving_step"]
    return f"{peer['peer_id']} ({peer['engine']}) {peer['state']}" + (
        f" version {version}" if version is not None else ""
    )


def describe_summary(summary: Line) -> str:
    """What was learned, in a plain sentence or two."""
    actors = cast("dict[str, int]", summary["groups_by_actor"])
    tasks = cast("dict[str, dict[str, float | None]]", summary["eval_tasks"])
    changes = [describe_change(task, before=ends["before"], after=ends["after"]) for task, ends in tasks.items()]
    learned = [text for text in changes if text] or ["Held-out accuracy was not measured at both ends."]
    flow = f"{summary['steps']} optimizer steps in {summary['wall_s'] / 60:.1f} minutes"
    if actors:
        flow += f", trained on {summary['trajectories_trained']} trajectories from {len(actors)} actors, at most "
        flow += f"{summary['max_staleness_trained']} steps old ({describe_idle(summary)})"
    return f"{' '.join(learned)} {flow}; lost {summary['lost']}, duplicates {summary['duplicates']}."


def describe_change(task: str, *, before: float | None, after: float | None) -> str:
    """Empty where an end was not measured."""
    if before is None or after is None:
        return ""
    verb = "rose" if after > before else "fell" if after < before else "stayed"
    return f"Held-out accuracy on {task} {verb} from {before:.3f} to {after:.3f}."


def _parse(text: bytes) -> Line:
    """Empty for a damaged line."""
    try:
        found: object = json.loads(text)
    except ValueError:
        return {}
    return cast(Line, found) if isinstance(found, dict) else {}


def _read_json(path: Path) -> Line:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
