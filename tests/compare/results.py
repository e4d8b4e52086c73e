"""The results of finished runs: small JSON files that can be committed, one for each run."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Score:
    """What an evaluation of one task found."""

    num_problems: int
    k: int
    accuracy: float
    """avg@k."""
    reward: float
    """Mean of the environment's score: partly right answers count in part."""
    answer_tokens: float
    truncated_frac: float
    num_right: str
    """Of each problem, how many of its k answers are right, a digit each: for statistics on the same problems."""

    @property
    def by_problem(self) -> list[float]:
        return [int(digit) / self.k for digit in self.num_right]


@dataclass(frozen=True)
class Result:
    """One finished run."""

    name: str
    part: str
    label: str
    seed: int
    lr: float | None
    settings_hash: str
    failure: str = ""
    """Why there are no figures: the run was tried twice, and ended like this."""
    earlier_failure: str = ""
    """How the first try ended, where it was tried twice."""
    validation: Mapping[str, list[float]] = field(default_factory=dict[str, list[float]])
    """`step` and `accuracy` of the run's own evaluations, greedy."""
    kept_step: int = 0
    """The version that was tested."""
    test: Score | None = None
    retention: Mapping[str, Score] = field(default_factory=dict[str, Score])
    entropy: float | None = None
    """Nats per token of answers to test problems."""
    curves: Mapping[str, list[float | None]] = field(default_factory=dict[str, list[float | None]])
    """Fields of metrics.jsonl, a value for each step."""
    budget: Mapping[str, int] = field(default_factory=dict[str, int])
    """What was used: steps, expert_rows, answers, tokens_sampled, policy_tokens and expert_tokens trained."""
    wall_s: Mapping[str, float] = field(default_factory=dict[str, float])
    """`run`: of chord-local, all starts included; `evaluation`: of what came after it."""
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """When, on what machine, from which commit."""

    @property
    def validation_accuracy(self) -> float:
        """Of the version that was tested; a failed run is worse than any."""
        if self.failure or self.kept_step not in self.validation.get("step", ()):
            return -1.0
        return self.validation["accuracy"][self.validation["step"].index(self.kept_step)]

    @property
    def retention_accuracy(self) -> float | None:
        """Mean over the families."""
        scores = [score.accuracy for score in self.retention.values()]
        return sum(scores) / len(scores) if scores else None


def load_results(folder: Path) -> dict[str, Result]:
    """By name. Raises ValueError at a file that is no result."""
    return {result.name: result for result in map(read_result, sorted(folder.glob("*.json")))}


def read_result(path: Path) -> Result:
    try:
        values = json.loads(path.read_text())
        test = values.pop("test")
        retention = {family: Score(**score) for family, score in values.pop("retention").items()}
        return Result(**values, test=Score(**test) if test else None, retention=retention)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a result of make compare ({error}), expected one, or no such file") from error


def write_result(folder: Path, result: Result) -> Path:
    """It appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(_compact(asdict(result)) + "\n")
    partial.replace(path)
    return path


def _compact(values: Mapping[str, Any]) -> str:
    """A line for each field."""
    lines = (f" {json.dumps(key)}: {json.dumps(_rounded(value), ensure_ascii=False)}" for key, value in values.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
