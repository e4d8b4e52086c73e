"""The publisher: what is announced, what is kept, and that a start publishes what the run says it did."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zmq

from common.errors import OperatorError, WaitTimeout
from common.run_dir import RunDir
from common.version import Version
from common.weights.client import WeightClient
from common.weights.server import WeightServer
from common.weights.snapshot import Snapshot
from common.wire.messages import EvaluationResult, Outcome, TaskScore
from common.wire.sockets import SocketLimits
from learner.audit.audit import audit
from learner.ledger.ledger import Ledger
from learner.publisher import Publisher
from learner.recorder import Recorder
from tests.runs import read_lines, read_summary


class Start:
    """One start of a learner, as far as its publisher goes."""

    def __init__(self, folder: Path, *, timeout_s: float = 20.0) -> None:
        self.folder = folder
        self.is_free = threading.Event()
        """Clear where a publication is to take its time."""
        self.is_free.set()
        self.kept: list[int] = []
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
            timeout_s=timeout_s,
            keep=self.keep,
        )

    def keep(self, snapshot: Snapshot) -> None:
        assert self.is_free.wait(20)
        self.kept.append(snapshot.version.step)

    def begin(self, step: int, value: float) -> None:
        self.publisher.publish({"weight": torch.full((4,), value)}, step)

    def publish(self, step: int, value: float, *, is_announced: bool = True) -> Snapshot:
        self.publisher.publish({"weight": torch.full((4,), value)}, step, is_announced=is_announced)
        return self.publisher.settle()

    def files(self) -> list[str]:
        return sorted(path.stem for path in (self.folder / "weights").glob("*.safetensors"))

    def close(self) -> None:
        self.is_free.set()
        self.publisher.close()
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


def test_an_evaluation_owed_from_an_earlier_start_is_not_left_out_when_its_version_is_made_again(start: Start) -> None:
    for step in (0, 2, 4):
        start.publish(step, float(step))
    start.close()
    again = Start(start.folder)
    try:
        again.publish(2, 2.0, is_announced=False)
        assert again.publisher.owed_steps == [0, 2, 4]
        assert again.files() == ["00000000", "00000002", "00000004"]
    finally:
        again.close()


def test_a_start_from_other_weights_than_the_run_had_is_refused_however_often_it_is_tried(start: Start) -> None:
    start.publish(0, 0.0)
    start.close()
    for _ in range(2):
        again = Start(start.folder)
        try:
            with pytest.raises(OperatorError, match=r"version 0 .*model.path or the checkpoint is not the one"):
                again.publish(0, 1.0)
        finally:
            again.close()
    mended = Start(start.folder)
    try:
        mended.publish(0, 0.0)
    finally:
        mended.close()


def test_the_next_step_begins_while_a_version_is_written_and_the_order_of_versions_is_kept(start: Start) -> None:
    start.is_free.clear()
    start.begin(0, 0.0)
    assert start.publisher.newest is None
    threading.Timer(0.05, start.is_free.set).start()
    for step in range(1, 4):
        start.begin(step, step)
        assert start.publisher.newest
        assert start.publisher.newest.step >= step - 1
    assert start.publisher.settle().version == start.publisher.newest
    assert start.kept == [0, 1, 2, 3]


def test_a_second_version_waits_for_the_first_within_a_limit_that_names_it(tmp_path: Path) -> None:
    start = Start(tmp_path, timeout_s=1.0)
    start.is_free.clear()
    start.begin(0, 0.0)
    expected = r"waited \d s for version 0 to be written and announced from the disk, expected it within 1 s"
    with pytest.raises(WaitTimeout, match=expected):
        start.begin(1, 1.0)
    start.close()
    assert start.kept == [0]


def test_what_goes_wrong_with_a_version_is_told_before_the_next_and_again_to_whoever_needs_it(start: Start) -> None:
    start.publish(0, 0.0)
    (start.folder / "weights" / "00000001.partial").mkdir()
    start.begin(1, 1.0)
    with pytest.raises(Exception, match="directory"):  # a learner that waits for groups looks here
        wait_for_failure(start.publisher)
    with pytest.raises(Exception, match="directory"):
        start.begin(2, 2.0)
    with pytest.raises(Exception, match="directory"):
        start.publisher.settle()
    assert start.publisher.newest
    assert start.publisher.newest.step == 0
    assert start.kept == [0]


def wait_for_failure(publisher: Publisher) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        publisher.check()
        time.sleep(0.01)


def test_a_version_that_takes_too_long_is_told_to_whoever_waits_for_groups(tmp_path: Path) -> None:
    start = Start(tmp_path, timeout_s=1.0)
    start.is_free.clear()
    start.begin(0, 0.0)
    start.publisher.check()
    with pytest.raises(WaitTimeout, match=r"waited \d s for version 0 to be written and announced from the disk"):
        wait_for_failure(start.publisher)
    start.close()


def test_an_actor_that_holds_the_version_before_fetches_what_differs(start: Start, tmp_path: Path) -> None:
    context, limits = zmq.Context.instance(), SocketLimits(1, 4, 8 << 20)
    address = f"tcp://127.0.0.1:{start.server.port}"
    client = WeightClient(context, address, tmp_path / "client", limits=limits, credit=3, timeout_s=20, retry_s=1)
    weight = torch.linspace(-1, 1, 1 << 16, dtype=torch.bfloat16)
    held = None
    try:
        for step in range(3):
            weight[:: 1000 + step] *= 1.01
            start.publisher.publish({"weight": weight.clone()}, step)
            snapshot, before = start.publisher.settle(), client.received_bytes
            held = client.fetch(snapshot.version, base=held)
            assert held.path.read_bytes() == snapshot.path.read_bytes()
            assert (client.received_bytes - before < snapshot.manifest.num_bytes / 100) == (step > 0)
    finally:
        client.close()


def test_a_version_in_the_place_of_another_has_no_delta_from_what_it_overwrote(start: Start) -> None:
    first = start.publish(1, 1.0)
    start.publisher.publish({"weight": torch.full((4,), 2.0)}, 1, replaces=True)
    second = start.publisher.settle()
    assert second.path == first.path
    assert start.server.num_deltas == 0
    start.publish(2, 3.0)
    assert start.server.num_deltas == 1


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
        "version_hash": version.hash, "time": lines[0]["time"],
    }  # fmt: skip
    assert abs(lines[0]["time"] - time.time()) < 60
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


def test_an_evaluation_stays_sound_where_its_version_comes_out_otherwise_later(start: Start) -> None:
    start.publish(0, 0.0)
    start.publish(2, 2.0)
    for _ in range(2):
        version = start.publisher.evaluation()
        assert version
        start.publisher.finish_evaluation(result_for(version, 1, 3))
    start.close()
    for value in (2.5, 2.75):
        again = Start(start.folder)
        again.publish(0, 0.0, is_announced=False)
        again.publish(2, value, is_announced=False)
        again.close()
    assert audit(RunDir(start.folder)).violations == []
    ledger = Ledger(start.folder / "ledger.sqlite", groups_per_step=1, max_staleness=0)
    ledger.evaluations.owe(4)
    ledger.note_version(4, "some")
    line = {"step": 4, "task": "sums", "version_hash": "other"}
    ledger.evaluations.finish(4, [line])
    Recorder(start.folder, ledger).restore()
    ledger.close()
    expected = "evaluations: that of version 4 on sums was made with other weights"
    assert audit(RunDir(start.folder)).violations == [expected]


def test_an_owed_version_that_comes_out_otherwise_takes_the_pin_of_what_it_was(start: Start) -> None:
    for step in (0, 2):
        start.publish(step, float(step))
    assert start.server.num_pinned == 2
    start.publish(2, 2.5, is_announced=False)
    assert start.publisher.owed_steps == [0, 2]
    assert start.server.num_pinned == 2


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
