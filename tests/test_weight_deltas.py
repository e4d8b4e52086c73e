"""The weight plane where peers hold an earlier version: they fetch what differs, and end with the same bytes."""

import asyncio
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from actors.engines.simulated import SimulatedEngine
from actors.fitter import Fitter
from common.config.schema import Actor, Network
from common.version import Version
from common.weights.client import FetchCancelled, VersionGone, WeightClient
from common.weights.deltas import Delta, Deltas, make_delta
from common.weights.server import WeightServer
from common.weights.snapshot import Snapshot
from common.wire.messages import MAX_DELTAS, Welcome
from common.wire.sockets import SocketLimits
from tests.test_weights import CHUNK_BYTES, NUM_CHUNKS, SIZE, snapshot_of, write_bytes

LIMITS = SocketLimits(heartbeat_s=0.5, silence_s=2.0, max_frame_bytes=8 << 20)


class Plane:
    """A learner's side that publishes versions which differ a little, and one peer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context: zmq.Context[Any] = zmq.Context()
        self.server = WeightServer(self.context, host="127.0.0.1", port=0, limits=LIMITS)
        self.client = WeightClient(
            self.context, f"tcp://127.0.0.1:{self.server.port}", folder / "client", limits=LIMITS, credit=3,
            timeout_s=20.0, retry_s=0.3,
        )  # fmt: skip
        self.snapshots: list[Snapshot] = []

    def publish(self, *, num_changed: int = 200, is_first_chunk_new: bool = False, with_delta: bool = True) -> Snapshot:
        """The next version: some words of the last one are others."""
        step = len(self.snapshots)
        path = self.folder / f"{step:08d}.safetensors"
        if step == 0:
            write_bytes(path, 0)
        else:
            numbers, words = np.random.default_rng(step), np.fromfile(self.snapshots[-1].path, dtype="<u2")
            words[numbers.choice(len(words), num_changed, replace=False)] += 1
            if is_first_chunk_new:
                words[: CHUNK_BYTES // 2] = numbers.integers(0, 1 << 16, CHUNK_BYTES // 2)
            words.tofile(path)
        self.snapshots.append(snapshot_of(path, step=step))
        delta = make_delta(self.snapshots[-2], self.snapshots[-1]) if step and with_delta else None
        self.server.publish(self.snapshots[-1], pin=True, delta=delta)
        return self.snapshots[-1]

    def fetch(self, step: int, *, base: Snapshot | None = None) -> tuple[Snapshot, int]:
        """A version as the peer has it then, and the bytes of it that were of use. The base goes on to be there."""
        before = self.client.received_bytes
        fetched = self.client.fetch(self.snapshots[step].version, base=self.copy(base) if base else None)
        assert fetched.path.read_bytes() == self.snapshots[step].path.read_bytes()
        assert fetched.manifest == self.snapshots[step].manifest
        return fetched, self.client.received_bytes - before

    def copy(self, snapshot: Snapshot) -> Snapshot:
        """As a peer may use it up."""
        path = self.folder / "base"
        path.unlink(missing_ok=True)
        if snapshot.path.exists():
            shutil.copyfile(snapshot.path, path)
        return replace(snapshot, path=path)

    def close(self) -> None:
        self.client.close()
        self.server.close()
        self.context.destroy(linger=0)


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    made = Plane(tmp_path)
    yield made
    made.close()


def test_who_holds_the_version_before_fetches_what_differs_and_who_holds_none_everything(plane: Plane) -> None:
    plane.publish()
    held, num_bytes = plane.fetch(0)
    assert num_bytes == SIZE
    for step in (1, 2, 3):
        plane.publish()
        held, num_bytes = plane.fetch(step, base=held)
        assert num_bytes < SIZE / 100
    assert plane.fetch(3)[1] == SIZE


def test_who_is_a_few_versions_behind_fetches_the_deltas_between(plane: Plane) -> None:
    plane.publish()
    held, _ = plane.fetch(0)
    for _ in range(MAX_DELTAS):
        plane.publish()
    one_step = plane.fetch(MAX_DELTAS, base=plane.snapshots[-2])[1]
    assert one_step < plane.fetch(MAX_DELTAS, base=held)[1] < 2 * MAX_DELTAS * one_step


def test_who_is_further_behind_than_deltas_are_kept_fetches_everything(plane: Plane) -> None:
    for _ in range(MAX_DELTAS + 2):
        plane.publish()
    assert plane.server.num_deltas == MAX_DELTAS
    assert plane.fetch(MAX_DELTAS + 1, base=plane.snapshots[0])[1] == SIZE
    assert plane.fetch(MAX_DELTAS + 1, base=plane.snapshots[1])[1] < SIZE / 20


def test_a_chunk_whose_deltas_are_longer_than_itself_comes_whole(plane: Plane) -> None:
    for _ in range(3):
        plane.publish(num_changed=0, is_first_chunk_new=True)
    assert plane.server.num_deltas == 2
    unchanged = NUM_CHUNKS - 1
    assert plane.fetch(2, base=plane.snapshots[1])[1] == CHUNK_BYTES + unchanged
    assert plane.fetch(2, base=plane.snapshots[0])[1] == CHUNK_BYTES + 2 * unchanged


def test_versions_that_do_not_follow_one_another_make_no_chain(plane: Plane) -> None:
    for with_delta in (True, True, False, True):
        plane.publish(with_delta=with_delta)
    assert plane.server.num_deltas == 1
    assert plane.fetch(3, base=plane.snapshots[1])[1] == SIZE
    assert plane.fetch(3, base=plane.snapshots[2])[1] < SIZE / 100


def test_deltas_are_bounded_in_bytes_too(tmp_path: Path) -> None:
    def delta(step: int, num_bytes: int) -> Delta:
        return Delta(str(step), str(step + 1), tempfile.TemporaryFile(dir=tmp_path), (0, num_bytes))

    kept, made = Deltas(), [delta(0, 60), delta(1, 30), delta(2, 20)]
    for one in made:
        kept.add(one, max_bytes=100)
    assert [one.file.closed for one in made] == [True, False, False]
    assert kept.between("1", "3") == made[1:]
    assert kept.between("0", "3") == kept.between("3", "1") == []
    kept.add(too_long := delta(3, 101), max_bytes=100)
    assert (len(kept), too_long.file.closed) == (0, True)
    assert all(one.file.closed for one in made)


def test_versions_of_other_sizes_have_no_delta(tmp_path: Path) -> None:
    small = snapshot_of(write_bytes(tmp_path / "a", 0, size=100), step=0)
    large = snapshot_of(write_bytes(tmp_path / "b", 0, size=200), step=1)
    assert make_delta(small, large) is None
    assert make_delta(small, small) is None


def test_the_same_weights_as_another_version_are_not_fetched_at_all(plane: Plane) -> None:
    first = plane.publish()
    held, _ = plane.fetch(0)
    again = first.version.model_copy(update={"step": 7})
    found = plane.client.fetch(again, base=held)
    assert (found.version, found.path, plane.client.received_bytes) == (again, held.path, SIZE)
    held.path.write_bytes(bytes(SIZE))
    assert plane.client.fetch(again, base=held).path.read_bytes() == first.path.read_bytes()


def test_a_base_that_is_not_what_it_was_costs_a_full_fetch_and_one_line(
    plane: Plane, caplog: pytest.LogCaptureFixture
) -> None:
    plane.publish()
    held, _ = plane.fetch(0)
    plane.publish()
    damaged = bytearray(held.path.read_bytes())
    damaged[::1000] = bytes(len(damaged[::1000]))
    held.path.write_bytes(damaged)
    caplog.set_level(logging.WARNING)
    fetched, num_bytes = plane.fetch(1, base=held)
    assert fetched.path.read_bytes() == plane.snapshots[1].path.read_bytes()
    assert num_bytes == SIZE
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"a delta from {held.version} did not give {fetched.version}: fetching what is missing whole"


def test_a_base_whose_file_is_gone_is_none(plane: Plane) -> None:
    plane.publish()
    held, _ = plane.fetch(0)
    held.path.unlink()
    plane.publish()
    assert plane.fetch(1, base=held)[1] == SIZE


@pytest.mark.parametrize("junk", [b"", b"\x09", b"\x00", b"\x01\xff\xff\xff\xff", bytes(CHUNK_BYTES // 2)])
def test_a_delta_of_anything_else_is_thrown_away(plane: Plane, junk: bytes) -> None:
    plane.publish()
    held, _ = plane.fetch(0)
    newest = plane.publish(with_delta=False)
    file = tempfile.TemporaryFile(dir=plane.folder)  # noqa: SIM115 -- the server closes it
    file.write(junk * newest.manifest.num_chunks)
    file.flush()
    offsets = tuple(range(0, len(junk) * newest.manifest.num_chunks + 1, len(junk))) if junk else (0,) * 25
    plane.server.publish(newest, pin=True, delta=Delta(held.version.hash, newest.version.hash, file, offsets))
    fetched, num_bytes = plane.fetch(1, base=held)
    assert fetched.path.read_bytes() == newest.path.read_bytes()
    assert num_bytes == SIZE


def test_a_fetch_of_deltas_goes_on_where_it_was_left(plane: Plane) -> None:
    plane.publish()
    held, _ = plane.fetch(0)
    newest = plane.publish()
    _, whole = plane.fetch(1, base=held)
    begun = plane.client.received_bytes
    with pytest.raises(FetchCancelled):
        plane.client.fetch(newest.version, lambda: plane.client.received_bytes - begun < whole / 2, base=held)
    assert plane.fetch(1, base=held)[1] < 0.7 * whole
    assert plane.client.received_bytes - begun < 1.2 * whole


def test_a_base_that_was_patched_in_part_for_one_version_is_none_for_the_next(plane: Plane) -> None:
    plane.publish()
    held, _ = plane.fetch(0)
    newest, begun = plane.publish(), plane.client.received_bytes
    with pytest.raises(FetchCancelled):
        plane.client.fetch(newest.version, lambda: plane.client.received_bytes == begun, base=held)
    assert not held.path.exists()
    plane.publish()
    assert plane.fetch(2, base=held)[1] == SIZE


def test_a_version_that_was_retired_is_gone_for_those_who_hold_the_one_before_too(plane: Plane) -> None:
    plane.publish()
    held, _ = plane.fetch(0)
    unknown = Version(run_id="run", incarnation=1, step=9, hash="ab" * 16)
    with pytest.raises(VersionGone, match="version 9"):
        plane.client.fetch(unknown, base=held)


def test_an_actor_keeps_what_it_fetched_last_and_asks_for_the_difference(plane: Plane) -> None:
    engine = SimulatedEngine(actor=Actor(engine="simulated"), vocab_size=10, end_tokens=frozenset({1}))  # pyright: ignore
    where = Welcome(weights_port=plane.server.port, announcements_port=plane.server.announcements_port, newest=None)

    async def fit_three_versions() -> list[int]:
        fitter = Fitter(
            engine,
            Network(port=1),
            plane.folder / "actor",
            name="a",
            in_flight=True,
            welcome=lambda: where,  # pyright: ignore
        )
        received: list[int] = []
        try:
            async with asyncio.timeout(20):
                for _ in range(3):
                    await fitter.fit(plane.publish().version)
                    received.append(fitter.received_bytes)
                    assert engine.version == plane.snapshots[-1].version
                    (file,) = (plane.folder / "actor").iterdir()
                    assert file.read_bytes() == plane.snapshots[-1].path.read_bytes()
        finally:
            await fitter.close()
        return received

    first, second, third = asyncio.run(fit_three_versions())
    assert first == SIZE
    assert max(second - first, third - second) < SIZE / 100
