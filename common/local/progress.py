"""What chord-local shows, in words: read from the run directory alone, so that it shows what is on record."""

import time
from collections import deque
from typing import Any, cast

from common.local.record import Board, BoardPeer, EvaluationLine, StepLine, Tail
from common.local.trends import Trends
from common.run_dir import RunDir

RATE_S = 20.0
"""Speeds are means over so much time."""
OLD_S = 5.0
"""The board is written twice a second: one that is older is said to be."""


class Progress:
    """Steps, evaluations and the learner's status board. What is on record already is known, and not told again."""

    def __init__(self, run_dir: RunDir) -> None:
        self.started = time.time()
        self._board_path = run_dir.status
        self._steps = Tail(run_dir.metrics, StepLine)
        self._evaluations = Tail(run_dir.evaluations, EvaluationLine)
        self.board: Board | None = None
        """None until the learner has written one."""
        self.board_age_s = 0.0
        self.last_step: StepLine | None = None
        self.trends = Trends()
        self._step_times: deque[float] = deque(maxlen=16)
        self._seen: set[tuple[str, int, str]] = set()
        """Kind, step and task of the lines that are known."""
        self._joined: set[str] = set()
        self._failed_sinks: set[str] = set()
        self._num_poisoned = 0
        self._tokens: dict[str, deque[tuple[float, int]]] = {}
        """By peer, when it had sampled how many tokens."""
        self._new_steps()
        self._new_evaluations()
        self.num_steps_before = self.last_step.step if self.last_step else 0

    def read_steps(self) -> list[str]:
        """A line of text for each step since the last call."""
        num_steps = self.board.num_steps if self.board else 0
        return [describe_step(line, num_steps=num_steps) for line in self._new_steps()]

    def read_news(self) -> list[str]:
        """One for each newcomer, evaluation and trouble since the last call."""
        self._read_board()
        texts = [*self._newcomers(self.board), *self._troubles(self.board)] if self.board else []
        return texts + [describe_evaluation(line) for line in self._new_evaluations()]

    def _read_board(self) -> None:
        try:
            found = Board.parse(self._board_path.read_bytes())
            self.board_age_s = max(time.time() - self._board_path.stat().st_mtime, 0.0)
        except OSError:
            return
        if found:
            self.board = found
            self._note_tokens(found)

    def _note_tokens(self, board: Board) -> None:
        now = time.monotonic()
        for peer in board.peers:
            noted = self._tokens.setdefault(peer.peer_id, deque())
            if noted and peer.sampled_tokens < noted[-1][1]:
                noted.clear()  # another process of that name, or another learner
            noted.append((now, peer.sampled_tokens))
            while now - noted[0][0] > RATE_S:
                noted.popleft()

    def tokens_per_s(self, peer_id: str) -> float:
        """What a peer sampled of late."""
        noted = self._tokens.get(peer_id)
        if not noted or noted[-1][0] - noted[0][0] < 1.0:
            return 0.0
        return (noted[-1][1] - noted[0][1]) / (noted[-1][0] - noted[0][0])

    def _newcomers(self, board: Board) -> list[str]:
        fresh = [peer for peer in board.peers if peer.peer_id not in self._joined]
        self._joined |= {peer.peer_id for peer in fresh}
        return [f"{peer.peer_id} joined: it samples with the {peer.engine} engine" for peer in fresh]

    def _troubles(self, board: Board) -> list[str]:
        """A line when a prompt was given up, and when a sink was."""
        count = board.dropped.get("poison", 0)
        before, self._num_poisoned = self._num_poisoned, count
        texts = [f"{count} prompts were given up as poison so far: see the learner's log"] if count > before else []
        fresh = board.sinks_failed.keys() - self._failed_sinks
        self._failed_sinks = set(board.sinks_failed)
        return texts + [f"nothing more goes to {name}: {board.sinks_failed[name]}" for name in sorted(fresh)]

    def _new_steps(self) -> list[StepLine]:
        """Those not known yet: a restarted learner writes its files anew."""
        fresh = [line for line in self._steps.read() if self._is_new("step", line.step)]
        for line in fresh:
            self.last_step = line
            self.trends.add_step(line)
            if line.step_s is not None:
                self._step_times.append(line.step_s)
        return fresh

    def _new_evaluations(self) -> list[EvaluationLine]:
        fresh = [line for line in self._evaluations.read() if self._is_new("evaluation", line.step, line.task)]
        for line in fresh:
            self.trends.add_evaluation(line)
        return fresh

    def _is_new(self, kind: str, step: int, task: str = "") -> bool:
        name = kind, step, task
        is_new = name not in self._seen
        self._seen.add(name)
        return is_new

    @property
    def recent_step_s(self) -> float:
        """Mean duration of the last steps; 0 where there are none."""
        return sum(self._step_times) / len(self._step_times) if self._step_times else 0.0

    def doing(self) -> str:
        """What the learner does at this moment, and whom it waits for."""
        if not self.board:
            return "starting (loading libraries)"
        waiting = f", waits for {self.board.waiting_for}" if self.board.waiting_for else ""
        age = f"{self.board_age_s:.0f} s ago: " if self.board_age_s > OLD_S else ""
        return f"{age}{self.board.phase} after step {self.board.step}{waiting}"

    def now(self) -> str:
        """The same, and who takes part, in one line."""
        peers = ", ".join(map(describe_peer, self.board.peers if self.board else ())) or "no actor has joined yet"
        idle = f"; {_idle_of(self.last_step)}" if self.last_step else ""
        return f"learner: {self.doing()}; {peers}{idle}"


def describe_step(line: StepLine, *, num_steps: int) -> str:
    parts = [f"step {line.step}/{num_steps}"]
    if line.reward_mean is not None:
        parts.append(f"reward {line.reward_mean:.3f}")
    if line.groups_with_signal_frac is not None:
        parts.append(f"signal {line.groups_with_signal_frac:.0%}")
    if line.staleness_mean is not None and line.staleness_max is not None:
        parts.append(f"staleness {line.staleness_mean:.1f} (max {line.staleness_max:.0f})")
    if line.mu is not None:
        parts.append(f"μ {line.mu:.3f}")
    if line.num_expert_tokens and line.expert_nll_mean is not None:
        parts.append(f"expert nll {line.expert_nll_mean:.3f}")
    if line.actor_tokens_per_s is not None and line.learner_tokens_per_s is not None:
        parts.append(f"tokens/s sampled {line.actor_tokens_per_s:.0f} trained {line.learner_tokens_per_s:.0f}")
    parts.append(_idle_of(line))
    if line.step_s is not None:
        parts.append(f"{line.step_s:.1f} s")
    return "  ".join(part for part in parts if part)


def _idle_of(line: StepLine) -> str:
    return describe_idle(learner=line.learner_wait_frac, actors=line.actor_idle_frac)


def describe_idle(*, learner: float | None, actors: float | None) -> str:
    """Who waited for whom, in a step or in the whole run; empty where that is not known."""
    shares = [f"{who} {share:.0%}" for who, share in (("learner", learner), ("actors", actors)) if share is not None]
    return f"idle: {' '.join(shares)}" if shares else ""


def describe_evaluation(line: EvaluationLine) -> str:
    interval = f" [{line.confidence_95[0]:.3f}, {line.confidence_95[1]:.3f}]" if line.confidence_95 else ""
    details: list[str] = []
    if line.num_correct is not None and line.num_problems is not None:
        num_answers = line.num_problems * line.samples_per_problem
        answers = "" if num_answers == line.num_problems else f"{num_answers} answers to "
        details.append(f"{line.num_correct} of {answers}{line.num_problems} problems")
    if line.wall_s is not None:
        details.append(f"{line.wall_s:.0f} s")
    told = f" ({', '.join(details)})" if details else ""
    return f"accuracy of version {line.step} on {line.task}: {line.accuracy:.3f}{interval}{told}"


def describe_peer(peer: BoardPeer) -> str:
    version = f" version {peer.serving_step}" if peer.serving_step is not None else ""
    return f"{peer.peer_id} ({peer.engine}) {peer.state}{version}"


def describe_summary(summary: dict[str, Any]) -> str:
    """What was learned, in a plain sentence or two."""
    actors = cast("dict[str, int]", summary["groups_by_actor"])
    tasks = cast("dict[str, dict[str, float | None]]", summary["eval_tasks"])
    changes = [describe_change(task, before=ends["before"], after=ends["after"]) for task, ends in tasks.items()]
    learned = [text for text in changes if text] or ["Held-out accuracy was not measured at both ends."]
    flow = f"{summary['steps']} optimizer steps in {summary['wall_s'] / 60:.1f} minutes"
    if actors:
        idle = describe_idle(learner=summary["learner_wait_frac"], actors=summary["actor_idle_frac"])
        flow += f", trained on {summary['trajectories_trained']} trajectories from {len(actors)} actors, at most "
        flow += f"{summary['max_staleness_trained']} steps old ({idle})"
    return f"{' '.join(learned)} {flow}; lost {summary['lost']}, duplicates {summary['duplicates']}."


def describe_change(task: str, *, before: float | None, after: float | None) -> str:
    """Empty where an end was not measured."""
    if before is None or after is None:
        return ""
    verb = "rose" if after > before else "fell" if after < before else "stayed"
    return f"Held-out accuracy on {task} {verb} from {before:.3f} to {after:.3f}."
