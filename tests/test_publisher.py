"""The publisher: what is announced, what is kept, and that a start publishes what the run says it did."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zmq

from common.errors import OperatorError
from common.version import Version
from common.weights.server import WeightServer
from common.wire.messages import EvaluationResult, Outcome, TaskScore
from common.wire.sockets import SocketLimits
from learner.ledger.ledger import Ledger
from learner.publisher import Publisher
from learner.recorder import Recorder
from tests.runs import read_lines, read_summary


class Start:
    """One start of a learner, as far as its publisher goes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = Ledger(folder / "ledger.sqlite", groups_per_step=1, max_staleness=0)
        self.server = WeightServer(zmq.Context.instance(), host="127.0.0.1", port=0, limits=SocketLimits(1, 4, 1 << 20))
        self.publisher = Publisher(
            folder / "weights",
            self.server,
            self.ledger,
            Recorder(folder, self.ledger),
            every_steps=2,
            last_steps={9},
            chunk_bytes=1 << 20,
        )

    def publish(self, step: int, value: float, *, is_announced: bool = True) -> None:
        self.publisher.publish({"weight": torch.full((4,), value)}, step, is_announced=is_announced)

    def files(self) -> list[str]:
        return sorted(path.stem for path in (self.folder / "weights").glob("*.safetensors"))

    def close(self) -> None:
        self.server.close()
        self.ledger.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    begun = Start(tmp_path)
    yield begun
    begun.close()


def test_a_replayed_version_is_not_announced_and_kept_only_where_it_is_to_be_evaluated(start: Start) -> None:
    for step in range(3):
        start.publish(step, step, is_announced=False)
    assert start.publisher.newest is None
    assert start.files() == ["00000000", "00000002"]
    start.publish(3, 3.0)
    assert start.publisher.newest
    assert start.publisher.newest.step == 3
    assert start.publisher.has_published(start.publisher.newest)


def test_a_start_from_other_weights_than_the_run_had_is_refused(start: Start) -> None:
    start.publish(0, 0.0)
    start.close()
    again = Start(start.folder)
    try:
        with pytest.raises(OperatorError, match=r"version 0 .*model.path or the checkpoint is not the one"):
            again.publish(0, 1.0)
    finally:
        again.close()


def test_a_damaged_snapshot_is_not_evaluated(start: Start) -> None:
    start.publish(0, 0.0)
    start.publish(2, 2.0)
    start.close()
    path = start.folder / "weights" / "00000002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    again = Start(start.folder)
    assert again.publisher.owed_steps == [0]
    assert again.files() == ["00000000"]
    again.close()


def score_of(task: str, num_correct: int, categories: dict[str, float] | None = None) -> TaskScore:
    """Of two problems, two answers each."""
    return TaskScore(
        task=task, num_problems=2, samples_per_problem=2, num_correct=num_correct, num_unparsed=1, num_truncated=0,
        confidence_95=(0.25, 1.0), pass_at_k={"1": num_correct / 4, "2": 0.5}, categories=categories or {},
        mean_score=num_correct / 4, mean_answer_tokens=3.0, wall_s=0.5,
    )  # fmt: skip


def result_for(version: Version, *right: int) -> EvaluationResult:
    names = ("sums", "mmlu_pro")
    scores = tuple(score_of(name, num_correct) for name, num_correct in zip(names, right, strict=True))
    return EvaluationResult(version=version, scores=scores)


def test_a_finished_evaluation_leaves_a_line_for_each_task_once(start: Start) -> None:
    start.publish(0, 0.0)
    version = start.publisher.evaluation()
    assert version
    assert start.publisher.finish_evaluation(result_for(version, 1, 3)) is Outcome.COMMITTED
    assert start.publisher.finish_evaluation(result_for(version, 4, 4)) is Outcome.REDELIVERED
    assert start.publisher.owed_steps == []
    lines = read_lines(start.folder / "eval.jsonl")
    assert [(line["task"], line["accuracy"]) for line in lines] == [("sums", 0.25), ("mmlu_pro", 0.75)]
    assert lines[0] == {
        "step": 0, "task": "sums", "num_problems": 2, "samples_per_problem": 2, "num_correct": 1, "accuracy": 0.25,
        "avg_at_k": 0.25, "num_unparsed": 1, "num_truncated": 0, "confidence_95": [0.25, 1.0],
        "pass_at_k": {"1": 0.25, "2": 0.5}, "mean_score": 0.25, "mean_answer_tokens": 3.0, "wall_s": 0.5,
        "version_hash": version.hash,
    }  # fmt: skip
    (start.folder / "eval.jsonl").write_text("damaged")
    Recorder(start.folder, start.ledger).restore()
    assert read_lines(start.folder / "eval.jsonl") == lines


def test_a_result_for_other_weights_is_refused(start: Start) -> None:
    start.publish(0, 0.0)
    version = start.publisher.evaluation()
    assert version
    other = version.model_copy(update={"hash": "0" * len(version.hash)})
    assert start.publisher.finish_evaluation(result_for(other, 1, 3)) is Outcome.REFUSED
    assert start.publisher.owed_steps == [0]


def test_the_summary_tells_of_every_task_and_of_the_first_by_name(start: Start) -> None:
    for step, right in ((0, (1, 3)), (2, (2, 2)), (9, (3, 0))):
        start.publish(step, float(step))
        version = start.publisher.evaluation()
        assert version
        start.publisher.finish_evaluation(result_for(version, *right))
    Recorder(start.folder, start.ledger).write_summary(num_steps=9)
    summary = read_summary(start.folder)
    assert (summary["eval_before"], summary["eval_after"]) == (0.25, 0.75)
    assert summary["eval_tasks"] == {
        "sums": {"before": 0.25, "after": 0.75}, "mmlu_pro": {"before": 0.75, "after": 0.0}
    }  # fmt: skip
