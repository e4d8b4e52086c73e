"""Datasets of the hub: the real library in its own process, against small hubs that serve, refuse, wait or drip."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROWS = [{"question": f"{n}?", "answer": n, "padding": "x" * 1000} for n in range(1200)]
DATA = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
COMMIT, DIGEST = "a" * 40, "b" * 40
FILE = {"type": "file", "path": "train.jsonl", "size": len(DATA), "oid": DIGEST}
DATASET = {"id": "owner/toy", "sha": COMMIT, "tags": [], "siblings": [{"rfilename": "train.jsonl"}]}
FETCH = """
import logging, sys
from common.errors import OperatorError
from common.hub import fetch_batches
logging.basicConfig(level=logging.INFO, format="%(message)s")
rows = []
try:
    for batch in fetch_batches("owner/toy", "train", limit_s=float(sys.argv[1])):
        rows += batch.to_pylist()
    print(len(rows), rows[-1]["question"])
except OperatorError as error:
    print(error)
"""


class Hub(BaseHTTPRequestHandler):
    """Serves one dataset of one file."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            self.reply(json.dumps([FILE]).encode())
        elif self.path.startswith("/api/datasets/owner/toy"):
            self.reply(json.dumps(DATASET).encode())
        elif self.path.endswith("train.jsonl"):
            self.reply(DATA)
        else:
            self.reply(b"{}", code=404)

    do_HEAD = do_GET

    def reply(self, body: bytes, *, code: int = 200) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{DIGEST}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if code != 200:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command != "HEAD":
            with suppress(OSError):
                self.send(body)

    def send(self, body: bytes) -> None:
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class SlowHub(Hub):
    """Sends the file in pieces, for longer than the limit in all."""

    def send(self, body: bytes) -> None:
        pieces = [body[start : start + 70_000] for start in range(0, len(body), 70_000)]
        for piece in pieces:
            time.sleep(1.0 if len(pieces) > 1 else 0.0)
            self.wfile.write(piece)


class DrippingHub(Hub):
    """Sends a byte now and then."""

    def send(self, body: bytes) -> None:
        for byte in body:
            time.sleep(0.5)
            self.wfile.write(bytes([byte]))


class SilentHub(Hub):
    """Says what the dataset is, and nothing more."""

    def do_GET(self) -> None:
        if self.path == "/api/datasets/owner/toy":
            super().do_GET()
        else:
            time.sleep(60)

    do_HEAD = do_GET


def refusing_hub(code: int) -> type[Hub]:
    class RefusingHub(Hub):
        def do_GET(self) -> None:
            self.send_response(code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

    return RefusingHub


@contextmanager
def serving(hub: type[Hub]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.socket.close()


def run_with(hub: str, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(cache)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_dataset_that_comes_slowly_is_fetched_whole_and_then_read_without_the_hub(tmp_path: Path) -> None:
    with serving(SlowHub) as hub:
        started = time.monotonic()
        done = run_with(hub, tmp_path, "-c", FETCH, "15")
        assert time.monotonic() - started > 15  # longer than the limit
        assert done.stdout == "1200 1199?\n", done.stderr
        assert done.stderr.splitlines()[0] == f"fetching owner/toy (split train) from {hub}"
    again = run_with(hub, tmp_path, "-c", FETCH, "30")
    assert again.stdout == "1200 1199?\n", again.stderr
    with serving(refusing_hub(503)) as broken:
        again = run_with(broken, tmp_path, "-c", FETCH, "30")
    assert again.stdout == "1200 1199?\n", again.stderr


@pytest.mark.parametrize("hub", [SilentHub, DrippingHub])
def test_a_hub_that_keeps_a_reader_waiting_is_given_up(hub: type[Hub], tmp_path: Path) -> None:
    with serving(hub) as address:
        started = time.monotonic()
        done = run_with(address, tmp_path, "-c", FETCH, "4")
        assert time.monotonic() - started < 90
    assert re.match(r"waited [4-9] s for more of owner/toy\[train\] from", done.stdout), done.stderr
    assert done.stdout.endswith(f"{address}, expected it within 4 s (HF_HUB_OFFLINE=1 reads what is cached)\n")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("code", [404, 401, 500])
def test_a_hub_that_refuses_is_told_in_one_line_and_no_request_is(code: int, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"task": "gsm8k", "problem": 0, "sample": 0, "text": "3"}\n')
    with serving(refusing_hub(code)) as address:
        command = ["-m", "actors.evaluator", "--answers", str(answers), "--benchmark", "gsm8k=owner/toy"]
        done = run_with(address, tmp_path, *command)
    assert (done.returncode, done.stdout) == (2, "")
    lines = [line for line in done.stderr.splitlines() if "waiting" not in line]
    assert len(lines) == 2, done.stderr
    assert f"fetching owner/toy (split test) from {address}" in lines[0]
    assert "owner/toy[test]: cannot be fetched (" in lines[1]
    assert "expected a .jsonl or .parquet file, a folder of .parquet files, or a dataset id" in lines[1]
