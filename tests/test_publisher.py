"""The publisher: what is announced, what is kept, and that a start publishes what the run says it did."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zmq

from common.errors import OperatorError
from common.weights.server import WeightServer
from common.wire.sockets import SocketLimits
from learner.ledger.ledger import Ledger
from learner.publisher import Publisher
from learner.recorder import Recorder


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
