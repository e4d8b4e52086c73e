"""The weight plane over real sockets: what is fetched is what was published, or it is not fetched at all."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zmq

from common.errors import WaitTimeout
from common.version import Version
from common.weights.client import FetchCancelled, VersionGone, WeightClient
from common.weights.server import MAX_KEPT, WeightServer
from common.weights.snapshot import Manifest, Snapshot, hash_chunk, hash_of_chunks, write_snapshot
from common.wire.codec import decode
from common.wire.messages import Announcement
from common.wire.ports import free_ports
from common.wire.sockets import SocketLimits, open_socket
from tests.chaos.proxy import Proxy, Weather

LIMITS = SocketLimits(heartbeat_s=0.5, silence_s=2.0, max_frame_bytes=8 << 20)
CHUNK_BYTES = 64 << 10
NUM_CHUNKS = 24
SIZE = CHUNK_BYTES * NUM_CHUNKS - 1000

SERVE = """
import sys
from pathlib import Path
import zmq
from common.version import Version
from common.weights.server import WeightServer
from common.weights.snapshot import Manifest, Snapshot, hash_chunk, hash_of_chunks
from common.wire.sockets import SocketLimits
path, port, chunk_bytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
data = path.read_bytes()
hashes = tuple(hash_chunk(data[i : i + chunk_bytes]) for i in range(0, len(data), chunk_bytes))
version = Version(run_id="run", incarnation=2, step=5, hash=hash_of_chunks(hashes))
server = WeightServer(zmq.Context(), host="127.0.0.1", port=port, limits=SocketLimits(0.5, 2.0, 1 << 20))
server.publish(Snapshot(path, Manifest(version, len(data), chunk_bytes, hashes)), pin=False)
print(server.port, flush=True)
sys.stdin.readline()
print(server.sent_bytes, flush=True)
"""
"""A process that offers one file as version 5, and tells at the end how many bytes it sent."""


def write_bytes(path: Path, seed: int, size: int = SIZE) -> Path:
    path.write_bytes(np.random.default_rng(seed).bytes(size))
    return path


def snapshot_of(path: Path, *, step: int) -> Snapshot:
    """Any file as a snapshot: the weight plane does not look into it."""
    data = path.read_bytes()
    hashes = tuple(hash_chunk(data[i : i + CHUNK_BYTES]) for i in range(0, len(data), CHUNK_BYTES))
    version = Version(run_id="run", incarnation=1, step=step, hash=hash_of_chunks(hashes))
    return Snapshot(path, Manifest(version, len(data), CHUNK_BYTES, hashes))


@pytest.fixture
def context() -> Iterator["zmq.Context[Any]"]:
    made = zmq.Context()
    yield made
    made.destroy(linger=0)


@pytest.fixture
def server(context: "zmq.Context[Any]") -> Iterator[WeightServer]:
    made = WeightServer(context, host="127.0.0.1", port=0, limits=LIMITS)
    yield made
    made.close()


@pytest.fixture
def connect(context: "zmq.Context[Any]", tmp_path: Path) -> Iterator[Callable[..., WeightClient]]:
    """Makes clients that are closed after the test."""
    made: list[WeightClient] = []

    def connect_(port: int, *, timeout_s: float = 20.0, retry_s: float = 0.3) -> WeightClient:
        folder = tmp_path / f"client-{len(made)}"
        address = f"tcp://127.0.0.1:{port}"
        made.append(
            WeightClient(context, address, folder, limits=LIMITS, credit=3, timeout_s=timeout_s, retry_s=retry_s)
        )
        return made[-1]

    yield connect_
    for client in made:
        client.close()


def publish(server: WeightServer, folder: Path, step: int, *, seed: int | None = None, pin: bool = False) -> Snapshot:
    path = write_bytes(folder / f"{step:08d}.safetensors", step if seed is None else seed, size=2 * CHUNK_BYTES)
    snapshot = snapshot_of(path, step=step)
    server.publish(snapshot, pin=pin)
    return snapshot


def test_what_is_fetched_is_what_was_published(
    server: WeightServer, connect: Callable[..., WeightClient], tmp_path: Path
) -> None:
    snapshot = snapshot_of(write_bytes(tmp_path / "weights", 0), step=5)
    server.publish(snapshot, pin=False)
    client = connect(server.port)
    fetched = client.fetch(snapshot.version)
    assert fetched.path.read_bytes() == snapshot.path.read_bytes()
    assert fetched.manifest == snapshot.manifest
    assert client.received_bytes == server.sent_bytes == SIZE
    assert list(fetched.path.parent.iterdir()) == [fetched.path]


def test_a_slow_path_is_no_dead_one_and_nothing_is_asked_for_twice(
    context: "zmq.Context[Any]", server: WeightServer, tmp_path: Path
) -> None:
    snapshot = snapshot_of(write_bytes(tmp_path / "weights", 0, size=5 * CHUNK_BYTES), step=5)
    server.publish(snapshot, pin=False)
    proxy = Proxy(host="127.0.0.2", target_host="127.0.0.1", ports=[server.port])
    proxy.change(Weather(bytes_per_s=100_000))  # a frame takes longer than silence_s, all of them longer than retry_s
    client = WeightClient(
        context, f"tcp://127.0.0.2:{server.port}", tmp_path / "client", limits=SocketLimits(0.1, 0.4, 1 << 20),
        credit=5, timeout_s=30.0, retry_s=2.9,
    )  # fmt: skip
    try:
        assert client.fetch(snapshot.version).path.read_bytes() == snapshot.path.read_bytes()
        assert client.received_bytes == server.sent_bytes
        assert (proxy.num_connections, proxy.num_broken) == (1, 0)
    finally:
        client.close()
        proxy.close()


def test_a_snapshot_of_tensors_can_be_loaded_after_its_journey(
    server: WeightServer, connect: Callable[..., WeightClient], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    tensors = {"b": torch.randn(40, 30, dtype=torch.bfloat16), "a": torch.arange(7)}
    snapshot = write_snapshot(tensors, tmp_path / "w", run_id="run", incarnation=2, step=3, chunk_bytes=1000)
    server.publish(snapshot, pin=False)
    loaded = load_file(connect(server.port).fetch(snapshot.version).path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_equal_weights_have_equal_hashes_in_any_order_and_others_have_others(tmp_path: Path) -> None:
    tensors = {name: torch.full((8, 4), float(i)) for i, name in enumerate("dacb")}

    def hash_of(some: dict[str, torch.Tensor], step: int) -> str:
        path = tmp_path / f"{step}.safetensors"
        return write_snapshot(some, path, run_id="r", incarnation=step, step=step, chunk_bytes=64).version.hash

    begun = hash_of(tensors, 0)
    assert hash_of(dict(sorted(tensors.items())), 1) == hash_of(dict(reversed(tensors.items())), 2) == begun
    assert hash_of(tensors | {"a": tensors["a"] + 1}, 3) != begun
    assert not list(tmp_path.glob("*.partial"))


def test_a_fetch_goes_on_after_the_server_was_killed_and_another_took_its_place(
    connect: Callable[..., WeightClient], tmp_path: Path
) -> None:
    snapshot = snapshot_of(write_bytes(tmp_path / "weights", 0), step=5)

    def start(port: int) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", SERVE, str(snapshot.path), str(port), str(CHUNK_BYTES)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def port_of(process: "subprocess.Popen[str]") -> int:
        """Known when it is ready."""
        assert process.stdout
        return int(process.stdout.readline())

    with start(free_ports(1, "127.0.0.1")[0]) as first:
        port = port_of(first)
        client = connect(port)
        successors: list[subprocess.Popen[str]] = []

        def kill_at_half() -> bool:
            if not successors and client.received_bytes > SIZE / 2:
                first.kill()
                first.wait()
                successors.append(start(port))
                assert port_of(successors[0]) == port
            return True

        fetched = client.fetch(snapshot.version, kill_at_half)
    assert fetched.path.read_bytes() == snapshot.path.read_bytes()
    assert client.received_bytes == SIZE
    (second,) = successors
    output, _ = second.communicate("how much?\n", timeout=20)
    assert SIZE / 3 < int(output) < SIZE * 0.8


def test_a_chunk_that_is_not_the_announced_one_is_never_accepted(
    server: WeightServer, connect: Callable[..., WeightClient], tmp_path: Path
) -> None:
    snapshot = snapshot_of(write_bytes(tmp_path / "weights", 0), step=5)
    server.publish(snapshot, pin=False)
    good = snapshot.path.read_bytes()
    with snapshot.path.open("r+b") as file:
        file.seek(3 * CHUNK_BYTES + 17)
        file.write(bytes([good[3 * CHUNK_BYTES + 17] ^ 1]))
    client = connect(server.port, timeout_s=2.0)
    expected = (
        rf"waited \d s for chunk {NUM_CHUNKS}/{NUM_CHUNKS} of version 5 \({snapshot.version.hash[:8]}\) from learner"
    )
    with pytest.raises(WaitTimeout, match=expected):
        client.fetch(snapshot.version)
    assert client.received_bytes == SIZE - CHUNK_BYTES
    assert not list((tmp_path / "client-0").glob("*.safetensors"))
    snapshot.path.write_bytes(good)
    assert client.fetch(snapshot.version).path.read_bytes() == good
    assert client.received_bytes == SIZE


def test_a_file_that_became_shorter_is_never_accepted(
    server: WeightServer, connect: Callable[..., WeightClient], tmp_path: Path
) -> None:
    snapshot = snapshot_of(write_bytes(tmp_path / "weights", 0), step=5)
    server.publish(snapshot, pin=False)
    with snapshot.path.open("r+b") as file:
        file.truncate(SIZE - 1)
    with pytest.raises(WaitTimeout, match=rf"chunk {NUM_CHUNKS}/{NUM_CHUNKS} of version 5"):
        connect(server.port, timeout_s=2.0).fetch(snapshot.version)


def test_a_learner_that_is_not_there_is_named_with_what_was_waited_for(
    server: WeightServer, connect: Callable[..., WeightClient]
) -> None:
    version = Version(run_id="run", incarnation=1, step=9, hash="ab" * 16)
    client = connect(server.port, timeout_s=0.5)
    server.close()
    with pytest.raises(WaitTimeout, match=r"waited \d s for the manifest of version 9 \(abababab\) from learner"):
        client.fetch(version)


def test_a_retired_version_is_gone_and_files_on_disk_are_bounded(
    server: WeightServer, connect: Callable[..., WeightClient], tmp_path: Path
) -> None:
    pinned = publish(server, tmp_path, 0, pin=True)
    retired = publish(server, tmp_path, 1)
    for step in range(2, 30):
        newest = publish(server, tmp_path, step)
        assert len(list(tmp_path.glob("*.safetensors"))) <= 1 + 1 + MAX_KEPT
    assert not retired.path.exists()
    client = connect(server.port)
    with pytest.raises(VersionGone, match="version 1 "):
        client.fetch(retired.version)
    assert client.fetch(pinned.version).path.read_bytes() == pinned.path.read_bytes()
    assert client.fetch(newest.version).path.read_bytes() == newest.path.read_bytes()
    assert server.num_pinned == 1
    server.unpin(pinned.version)
    for step in range(30, 36):
        publish(server, tmp_path, step)
    assert not pinned.path.exists()


def test_a_fetch_in_progress_ends_well_while_newer_versions_are_published(
    server: WeightServer, connect: Callable[..., WeightClient], tmp_path: Path
) -> None:
    begun = snapshot_of(write_bytes(tmp_path / "begun", 0), step=0)
    data = begun.path.read_bytes()
    server.publish(begun, pin=False)
    client, steps, seen = connect(server.port), iter(range(1, 1000)), 0

    def publish_after_each_chunk() -> bool:
        nonlocal seen
        if client.received_bytes > seen:
            seen = client.received_bytes
            publish(server, tmp_path, next(steps))
        return True

    assert client.fetch(begun.version, publish_after_each_chunk).path.read_bytes() == data
    assert next(steps) == NUM_CHUNKS > 5 * MAX_KEPT, "after the last chunk there is nothing to wait for"


def test_versions_with_the_same_bytes_leave_one_file_and_are_pinned_each_for_itself(
    server: WeightServer, connect: Callable[..., WeightClient], tmp_path: Path
) -> None:
    snapshots = [publish(server, tmp_path, step, seed=0, pin=step < 2) for step in range(4)]
    assert len({snapshot.version.hash for snapshot in snapshots}) == 1
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["00000003.safetensors"]
    assert server.num_pinned == 2
    server.unpin(snapshots[0].version)
    server.unpin(snapshots[0].version)
    for step in range(4, 14):
        publish(server, tmp_path, step)
    fetched = connect(server.port).fetch(snapshots[1].version)
    assert fetched.version == snapshots[1].version
    assert fetched.path.read_bytes() == snapshots[3].path.read_bytes()


def test_a_late_joiner_fetches_the_newest(
    server: WeightServer, connect: Callable[..., WeightClient], tmp_path: Path
) -> None:
    for step in range(8):
        newest = publish(server, tmp_path, step)
    assert server.newest == newest.version
    assert connect(server.port).fetch(server.newest).path.read_bytes() == newest.path.read_bytes()


def test_a_fetch_that_nobody_wants_any_more_ends_and_the_next_goes_on_from_there(
    server: WeightServer, connect: Callable[..., WeightClient], tmp_path: Path
) -> None:
    snapshot = snapshot_of(write_bytes(tmp_path / "weights", 0), step=5)
    server.publish(snapshot, pin=False)
    client = connect(server.port)
    with pytest.raises(FetchCancelled):
        client.fetch(snapshot.version, lambda: client.received_bytes < SIZE / 2)
    assert client.fetch(snapshot.version).path.read_bytes() == snapshot.path.read_bytes()
    assert client.received_bytes == SIZE


def test_every_version_is_announced(context: "zmq.Context[Any]", server: WeightServer, tmp_path: Path) -> None:
    listener = open_socket(context, zmq.SUB, LIMITS)
    listener.setsockopt(zmq.SUBSCRIBE, b"")
    listener.connect(f"tcp://127.0.0.1:{server.announcements_port}")
    steps = iter(range(1000))
    published = [publish(server, tmp_path, next(steps)).version]
    while not listener.poll(50):  # a subscription takes its time
        published.append(publish(server, tmp_path, next(steps)).version)
    published += [publish(server, tmp_path, next(steps)).version for _ in range(3)]
    heard: list[Version] = []
    while published[-1] not in heard:
        assert listener.poll(10_000)
        message = decode(listener.recv_multipart(), max_bytes=1 << 16).message
        assert isinstance(message, Announcement)
        heard.append(message.version)
    assert len(heard) >= 4
    assert heard == published[-len(heard) :]
    listener.close()


def test_garbage_does_not_stop_the_server(
    context: "zmq.Context[Any]", server: WeightServer, connect: Callable[..., WeightClient], tmp_path: Path
) -> None:
    snapshot = publish(server, tmp_path, 0)
    vandal = open_socket(context, zmq.DEALER, LIMITS)
    vandal.connect(f"tcp://127.0.0.1:{server.port}")
    deep = b"\x82\xa8protocol" + b"\x91" * 1000 + b"\xc0\xa4kind\xa1x"
    for frames in ([b""], [b"\xff" * 100], [deep], [b"x"] * 50, [b"y" * 100_000]):
        vandal.send_multipart(frames)
    assert connect(server.port).fetch(snapshot.version).path.read_bytes() == snapshot.path.read_bytes()
    vandal.close()
