"""The actor's side of the wire: what a link sends again and what not, how long it waits, and what it says meanwhile."""

import asyncio
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import zmq

from actors.engines.simulated import SimulatedEngine
from actors.fitter import Fitter
from common.config.schema import Actor, Network
from common.version import Version
from common.weights.server import WeightServer
from common.wire.messages import Welcome
from tests.test_weights import LIMITS, snapshot_of, write_bytes


def test_a_fitter_takes_the_first_weights_of_a_new_run_though_they_are_those_of_the_old_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    context: zmq.Context[Any] = zmq.Context()
    server = WeightServer(context, host="127.0.0.1", port=0, limits=LIMITS)
    old = snapshot_of(write_bytes(tmp_path / "weights", 0), step=0)
    server.publish(old, pin=True)
    engine = SimulatedEngine(actor=Actor(engine="simulated"), vocab_size=10, end_tokens=frozenset({1}))
    whereabouts: list[Welcome | None] = [None]
    num_asked = itertools.count()
    network = Network(port=1, request_timeout_s=0.5)  # pyright: ignore

    def welcome() -> Welcome | None:
        next(num_asked)
        return whereabouts[0]

    async def outlive_a_run() -> Version | None:
        fitter = Fitter(engine, network, tmp_path / "fetched", name="a", in_flight=True, welcome=welcome)
        following = asyncio.create_task(fitter.follow())
        try:
            async with asyncio.timeout(20):
                fitter.want(old.version)
                while next(num_asked) < 80:  # the fetch was tried several times
                    await asyncio.sleep(0.02)
                ports = {"weights_port": server.port, "announcements_port": server.announcements_port}
                whereabouts[0] = Welcome(newest=old.version, **ports)
                new = old.version.model_copy(update={"run_id": "another"})
                for version in (old.version, new):
                    fitter.want(version)
                    while engine.version != version:
                        await asyncio.sleep(0.02)
        finally:
            following.cancel()
            await fitter.close()
        return engine.version

    try:
        assert asyncio.run(outlive_a_run()) == old.version.model_copy(update={"run_id": "another"})
    finally:
        server.close()
        context.destroy(linger=0)
    assert caplog.text.count("not to be had") == 1
