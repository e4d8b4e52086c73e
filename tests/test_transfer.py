"""Weights that the courier hands over: its real process, gloo in NCCL's place, and what becomes of every failure.

The engine here receives as vLLM's worker does, into a dictionary; test_vllm.py does it with vLLM.
"""

import asyncio
import logging
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from safetensors.torch import load_file
from torch import Tensor

from actors.engines.simulated import SimulatedEngine
from actors.engines.vllm_transfer import TransferEnd, TransferOrder, make_receiver
from actors.fitter import Fitter
from actors.transfer import Transfer
from common.config.load import resolve_config
from common.config.schema import Actor, Config
from common.errors import ConfigError, OperatorError
from common.keys.allowed import ServerKeys
from common.keys.folder import KeyFolder
from common.version import Version
from common.weights.server import WeightServer
from common.weights.snapshot import Snapshot, write_snapshot
from common.wire.messages import Welcome
from common.wire.ports import is_free
from common.wire.sockets import SocketLimits
from learner.courier.process import Courier, check_courier
from learner.courier.service import START_S

LIMITS = SocketLimits(heartbeat_s=0.5, silence_s=2.0, max_frame_bytes=8 << 20)
PATIENCE_S = 60.0
"""With a turn: longer than any that comes to something."""
TIMEOUT_S = 4.0
"""Of a turn, where a test waits for its end."""


class TensorEngine(SimulatedEngine):
    """Samples nothing; what it received lies open."""

    name = "tensors"
    num_workers = 1

    def __init__(self) -> None:
        super().__init__(actor=Actor(), vocab_size=10, end_tokens=frozenset({1}))  # pyright: ignore
        self.tensors: dict[str, Tensor] = {}
        self.invitations: list[str] = []
        self.before_it_begins: Callable[[], Awaitable[None]] | None = None
        self.before_it_receives: Callable[[], Awaitable[None]] | None = None
        self._end = TransferEnd(lambda order: make_receiver(order, None), rank=0)

    async def receive(self, transfer: Transfer, *, begin: Callable[[], Awaitable[None]]) -> None:
        self._version = None
        if self.before_it_begins:
            await self.before_it_begins()
        await begin()
        if self.before_it_receives:
            await self.before_it_receives()
        order = TransferOrder(**transfer.order(self.num_workers))
        self.invitations.append(order.invitation)
        await asyncio.to_thread(self._end.receive, order, self._take)
        self._version = transfer.version

    def _take(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        self.tensors |= dict(tensors)

    async def load(self, snapshot: Snapshot, *, in_flight: bool = True) -> None:
        self.tensors = load_file(snapshot.path)
        await super().load(snapshot, in_flight=in_flight)


class Site:
    """A learner's weight server and courier, and actors."""

    def __init__(self, folder: Path, *, keys: str = "", allowed: str = "", turn_s: float = TIMEOUT_S) -> None:
        self.folder = folder
        overrides = ["weights.transport=gloo", f"weights.transfer_timeout_s={turn_s}", "learner.num_threads=1"]
        overrides += [f"network.keys={keys}", f"network.allowed_keys={allowed}"]
        self.config: Config = resolve_config(None, overrides).config
        self.context: zmq.Context[Any] = zmq.Context()
        self.keys = ServerKeys(self.context, keys, allowed=allowed) if keys else None
        self.server = WeightServer(self.context, host="127.0.0.1", port=0, limits=LIMITS, keys=self.keys)
        self.courier = Courier(self.config)
        self.await_courier()
        self.fitters: list[Fitter] = []
        self.step = -1
        self.tensors: dict[str, Tensor] = {}

    def await_courier(self) -> None:
        """It has much to import first."""
        deadline = time.monotonic() + 300
        while is_free("127.0.0.1", self.courier.port):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def publish(self) -> Version:
        self.step += 1
        step = self.step
        numbers = torch.Generator().manual_seed(step)
        shapes = {"a": (300, 70), "b": (5,), "c": (129, 3)}
        self.tensors = {
            name: torch.randn(shape, generator=numbers).to(torch.bfloat16) for name, shape in shapes.items()
        }
        path = self.folder / f"{step:08d}.safetensors"
        snapshot = write_snapshot(self.tensors, path, run_id="run", incarnation=1, step=step, chunk_bytes=1 << 16)
        shutil.copyfile(path, self.parcel)
        self.courier.offer(Snapshot(self.parcel, snapshot.manifest))
        self.server.publish(snapshot, pin=True)
        return snapshot.version

    @property
    def parcel(self) -> Path:
        """The file that the courier reads, of the newest version."""
        return self.folder / f"parcel-{self.step}"

    def join(self, name: str = "actor-0", *, engine: Any = None, config: Config | None = None) -> Fitter:
        welcome = Welcome(
            weights_port=self.server.port, announcements_port=self.server.announcements_port,
            courier_port=self.courier.port, newest=None,
        )  # fmt: skip
        name = f"{name}.{len(self.fitters)}"
        self.fitters.append(
            Fitter(
                engine or TensorEngine(), (config or self.config).network, self.folder / name, name=name,
                in_flight=True, welcome=lambda: welcome, weights=(config or self.config).weights,
            )
        )  # fmt: skip
        return self.fitters[-1]

    def run(self, test: Callable[[], Awaitable[Any]]) -> None:
        async def limited() -> None:
            async with asyncio.timeout(120):
                try:
                    await test()
                finally:
                    while self.fitters:
                        await self.fitters.pop().close()

        asyncio.run(limited())

    def assert_served(self, fitter: Fitter, version: Version) -> None:
        engine: Any = fitter._engine
        assert engine.version == version
        assert engine.tensors.keys() == self.tensors.keys()
        for name, tensor in self.tensors.items():
            assert torch.equal(engine.tensors[name].view(torch.int16), tensor.view(torch.int16))

    def close(self) -> None:
        self.courier.close()
        self.server.close()
        if self.keys:
            self.keys.close()
        self.context.destroy(linger=0)


@pytest.fixture(autouse=True)
def informed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Serves all tests that leave its courier alone."""
    made = Site(tmp_path_factory.mktemp("site"), turn_s=PATIENCE_S)
    yield made
    made.close()


@pytest.fixture
def own_site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()


def num_received(fitter: Fitter) -> int:
    assert fitter._transfers
    return fitter._transfers.num_received


def test_versions_come_bit_for_bit_over_one_group_and_nothing_over_zeromq(site: Site) -> None:
    one, other, before = site.join("actor-0"), site.join("actor-1"), site.server.sent_bytes

    async def test() -> None:
        for _ in range(3):
            version = site.publish()
            await asyncio.gather(one.fit(version), other.fit(version))
            site.assert_served(one, version)
            site.assert_served(other, version)

    site.run(test)
    assert site.server.sent_bytes == before
    assert num_received(one) == num_received(other) == 3
    engine: Any = one._engine
    assert [bool(invitation) for invitation in engine.invitations] == [True, False, False]


def test_tensors_that_are_not_those_of_the_hash_never_count(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    fitter, before = site.join(), site.server.sent_bytes

    async def damage() -> None:
        """As if bits were lost on the way: the courier's file is another one since it took the fingerprint."""
        with site.parcel.open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(b"\xff" * 10)

    async def test() -> None:
        engine: Any = fitter._engine
        await fitter.fit(site.publish())
        engine.before_it_begins = damage
        version = site.publish()
        await fitter.fit(version)
        site.assert_served(fitter, version)
        engine.before_it_begins = None
        version = site.publish()
        await fitter.fit(version)
        site.assert_served(fitter, version)

    site.run(test)
    line = r"version \d+ .* did not come by gloo: weights: got tensors with fingerprint \w+, expected"
    assert re.search(line, caplog.text)
    assert num_received(fitter) == 2
    assert site.server.sent_bytes - before == site.parcel.stat().st_size


def test_without_a_courier_versions_are_fetched_and_the_next_offer_starts_another(
    own_site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site, fitter = own_site, own_site.join()

    async def test() -> None:
        await fitter.fit(site.publish())
        first = site.courier.pid
        version = site.publish()
        os.kill(first, signal.SIGKILL)
        await fitter.fit(version)
        site.assert_served(fitter, version)
        site.publish()
        assert site.courier.pid != first
        site.await_courier()
        version = site.publish()
        await fitter.fit(version)
        site.assert_served(fitter, version)

    site.run(test)
    assert "the courier ended with exit code -9: starting it again" in caplog.text
    assert "version 1" in caplog.text
    assert "from the learner's courier" in caplog.text
    assert num_received(fitter) == 2


def test_an_engine_that_hangs_in_its_turn_holds_neither_the_learner_nor_the_others(own_site: Site) -> None:
    site, hanging, other = own_site, own_site.join("actor-0"), own_site.join("actor-1")

    async def test() -> None:
        version = site.publish()
        await other.fit(version)
        engine: Any = hanging._engine
        engine.before_it_receives = lambda: asyncio.sleep(30)
        stuck = asyncio.create_task(hanging.fit(version))
        await asyncio.sleep(1.0)
        version = site.publish()
        assert not stuck.done()
        await other.fit(version)
        site.assert_served(other, version)
        stuck.cancel()
        with suppress(subprocess.TimeoutExpired):
            site.courier._process.wait(TIMEOUT_S)  # where gloo is not faster to give up
        site.publish()
        site.await_courier()
        version = site.publish()
        await other.fit(version)
        site.assert_served(other, version)

    site.run(test)
    assert num_received(other) > 1


def test_an_engine_that_left_before_its_turn_is_passed_over(site: Site) -> None:
    leaving, other = site.join("actor-0"), site.join("actor-1")

    async def test() -> None:
        version = site.publish()
        await other.fit(version)
        os.kill(site.courier.pid, signal.SIGSTOP)  # so that both are in its queue
        version = site.publish()
        left = asyncio.create_task(leaving.fit(version))
        waits = asyncio.create_task(other.fit(version))
        await asyncio.sleep(0.3)
        left.cancel()
        assert leaving._transfers
        leaving._transfers.close()
        await asyncio.sleep(0.2)
        os.kill(site.courier.pid, signal.SIGCONT)
        started = time.monotonic()
        await waits
        assert time.monotonic() - started < START_S, "nobody waited for the one that left"
        site.assert_served(other, version)

    site.run(test)
    assert num_received(other) == 2


def test_another_version_than_the_newest_is_fetched(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    fitter, before = site.join(), site.server.sent_bytes

    async def test() -> None:
        older, _ = site.publish(), site.publish()
        await fitter.fit(older)
        assert fitter._engine.version == older

    site.run(test)
    assert re.search(r"version \d+ .* is not handed over \(the newest is version \d+ .*\): fetching it", caplog.text)
    assert site.server.sent_bytes > before


def test_after_three_failures_in_a_row_all_is_fetched(own_site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site, fitter = own_site, own_site.join()  # the courier waits for each turn as long as one may take

    async def fail() -> None:
        raise RuntimeError("no group today")

    async def test() -> None:
        engine: Any = fitter._engine
        engine.before_it_receives = fail
        for _ in range(5):
            version = site.publish()
            await fitter.fit(version)
            site.assert_served(fitter, version)

    site.run(test)
    assert "no group today" in caplog.text
    assert caplog.text.count("did not come by gloo") == 3
    assert "and all that follow, after 3 failures in a row" in caplog.text
    assert num_received(fitter) == 0


@pytest.mark.parametrize("allowed", ["", "elsewhere"])
def test_with_keys_only_those_who_hold_one_that_is_allowed_get_a_turn(tmp_path: Path, allowed: str) -> None:
    folder = KeyFolder(tmp_path / "keys", tmp_path / allowed if allowed else None)
    for name in ("learner", "actor-0", "stranger"):
        folder.create(name)
    folder.allow("actor-0", folder.public("actor-0"))
    if allowed:  # the folder that does not count lets in who is a stranger now
        KeyFolder(folder.path).allow("stranger", folder.public("stranger"))
    site = Site(tmp_path, keys=str(folder.path), allowed=str(folder.allowed) if allowed else "")
    try:
        known, stranger = site.join("actor-0"), site.join("stranger")

        async def test() -> None:
            version = site.publish()
            await known.fit(version)
            site.assert_served(known, version)
            assert num_received(known) == 1
            assert stranger._transfers
            assert not await stranger._transfers.bring(version, site.courier.port)

        site.run(test)
    finally:
        site.close()


def test_the_courier_ends_with_the_learner(tmp_path: Path) -> None:
    site = Site(tmp_path)
    process = site.courier._process
    try:
        site.courier._input.close()  # as the kernel does when the learner is killed
        assert process.wait(90) == 0
    finally:
        site.close()


def test_an_engine_that_takes_files_only_is_refused_in_one_line(site: Site) -> None:
    with pytest.raises(OperatorError, match=r'weights.transport: got "gloo" with the simulated engine, expected vllm'):
        site.join(engine=SimulatedEngine(actor=Actor(), vocab_size=10, end_tokens=frozenset({1})))  # pyright: ignore


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["actor.engine=transformers"], 'actor.engine: got "transformers" with weights.transport "nccl", expected'),
        (["actor.swap=wait"], 'actor.swap: got "wait" with weights.transport "nccl", expected "in_flight"'),
        (["learner.lora_rank=4"], 'learner.lora_rank: got 4 with weights.transport "nccl", expected weights.transport'),
    ],
)
def test_what_does_not_go_with_it_is_refused_in_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(line)) as refused:
        resolve_config(None, ["weights.transport=nccl", *overrides])
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nccl_without_a_gpu_is_refused_in_one_line() -> None:
    config = resolve_config(None, ["weights.transport=nccl"]).config
    with pytest.raises(OperatorError, match=r'weights.transport: got "nccl", expected (it with a GPU|vLLM)'):
        check_courier(config)
