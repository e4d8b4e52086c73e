"""The learner's hold on its courier: starts it, tells it of every version, and starts it again where it ended.

Nothing here waits for the courier. Engines that do not get a version from it fetch that one over ZeroMQ.
"""

import importlib.util
import logging
import os
import subprocess
import sys
from contextlib import suppress

from common.config.schema import Config
from common.errors import OperatorError
from common.weights.snapshot import Snapshot
from common.wire.ports import free_ports
from learner.courier.settings import CourierOffer, CourierSettings

log = logging.getLogger(__name__)

END_S = 2.0


class Courier:
    """Used by one thread at a time."""

    def __init__(self, config: Config) -> None:
        weights, network = config.weights, config.network
        self._settings = CourierSettings(
            transport=weights.transport,
            host=network.host,
            port=weights.courier_port or free_ports(1, network.host)[0],
            keys=network.keys,
            allowed_keys=network.allowed_keys,
            device=int(os.environ.get("LOCAL_RANK", "0")),
            num_threads=config.learner.num_threads,
            timeout_s=weights.transfer_timeout_s,
            heartbeat_s=network.heartbeat_s,
            silence_s=network.silence_s,
            max_connections=network.max_connections,
        )
        self.port = self._settings.port
        self._process = self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def offer(self, snapshot: Snapshot) -> None:
        """Have engines get this version from now on, and no other. The file may be deleted when the next one comes."""
        if (code := self._process.poll()) is not None:
            log.warning("the courier ended with exit code %d: starting it again", code)
            self._restart()
        line = CourierOffer(path=str(snapshot.path.resolve()), version=snapshot.version).model_dump_json()
        if not self._tell(line):
            log.warning("the courier takes no versions: starting it again")
            self._restart()
            self._tell(line)

    def close(self) -> None:
        """It ends when its input does."""
        with suppress(OSError):
            self._input.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start(self) -> "subprocess.Popen[bytes]":
        # Its own session: a Ctrl-C is the learner's, which ends the courier when nobody needs it any more.
        process = subprocess.Popen(
            [sys.executable, "-m", "learner.courier"], stdin=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        assert process.stdin
        self._input = process.stdin
        os.set_blocking(self._input.fileno(), False)
        self._tell(self._settings.model_dump_json())
        return process

    def _restart(self) -> None:
        self._process.kill()
        self._process.wait()
        self._input.close()
        self._process = self._start()

    def _tell(self, line: str) -> bool:
        """False where it does not read: its pipe is full, or it has just ended."""
        data = line.encode() + b"\n"
        try:
            return self._input.write(data) == len(data)
        except OSError:
            return False


def check_courier(config: Config) -> None:
    """Raises OperatorError where this machine cannot send as it is to."""
    if config.weights.transport != "nccl":
        return
    if importlib.util.find_spec("vllm") is None:
        raise OperatorError('weights.transport: got "nccl", expected vLLM to be installed with the learner too')
    from common.weights.nccl import check_gpu

    check_gpu()
