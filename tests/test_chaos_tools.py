"""The tools of `make chaos`: the proxy's faults are those it promises, and a small hostile load stops nobody."""

import errno
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.chaos.demands import unmet
from tests.chaos.ends import Ends
from tests.chaos.keys import make_keys
from tests.chaos.proxy import CALM, Proxy, Weather
from tests.chaos.schedule import COUNTS
from tests.chaos.shim import Kind, Shim
from tests.chaos.siege import besiege
from tests.chaos.site import Site
from tests.installed import install_environment
from tests.runs import LocalRun, audit, write_config

FAR = "127.0.0.9"


@pytest.fixture
def echo_port() -> Iterator[int]:
    """A server that answers every byte with itself."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with closing(connection):
            try:
                while data := connection.recv(65536):
                    connection.sendall(data)
            except OSError:
                pass

    threading.Thread(target=serve, daemon=True).start()
    yield listener.getsockname()[1]
    listener.close()


@pytest.fixture
def proxy(echo_port: int) -> Iterator[Proxy]:
    proxy = Proxy(host=FAR, target_host="127.0.0.1", ports=[echo_port], seed=1)
    yield proxy
    proxy.close()


def connect(port: int) -> socket.socket:
    return socket.create_connection((FAR, port), timeout=10)


def answer(connection: socket.socket, data: bytes = b"hello") -> bytes:
    """What comes back, until as much came as was sent, or the end."""
    connection.sendall(data)
    found = b""
    while len(found) < len(data) and (more := connection.recv(65536)):
        found += more
    return found


def wait_until(is_reached: Callable[[], bool], limit_s: float = 10) -> None:
    deadline = time.monotonic() + limit_s
    while not is_reached():
        assert time.monotonic() < deadline, f"not reached within {limit_s} s"
        time.sleep(0.01)


def test_a_calm_proxy_passes_everything_on(proxy: Proxy, echo_port: int) -> None:
    with connect(echo_port) as connection:
        data = bytes(range(256)) * 4000
        sender = threading.Thread(target=connection.sendall, args=(data,))
        sender.start()
        found = b""
        while len(found) < len(data):
            found += connection.recv(65536)
        sender.join()
    assert found == data
    assert (proxy.num_connections, proxy.num_broken) == (1, 0)


def test_a_reset_ends_every_connection_at_once_and_new_ones_are_served(proxy: Proxy, echo_port: int) -> None:
    with connect(echo_port) as connection:
        assert answer(connection) == b"hello"
        assert proxy.reset_all() == 2
        with pytest.raises(ConnectionResetError):
            answer(connection)
    with connect(echo_port) as connection:
        assert answer(connection) == b"hello"


def test_a_black_hole_keeps_connections_and_moves_nothing_until_it_ends(proxy: Proxy, echo_port: int) -> None:
    with connect(echo_port) as connection:
        assert answer(connection) == b"hello"
        proxy.change(Weather(is_black_hole=True))
        connection.sendall(b"later")
        with connect(echo_port) as newcomer:
            newcomer.sendall(b"me too")
            for silent in (connection, newcomer):
                silent.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    silent.recv(1)
                silent.settimeout(10)
            proxy.change(CALM)
            assert connection.recv(100) == b"later"
            assert newcomer.recv(100) == b"me too"


def test_a_cut_passes_a_part_on_and_closes(proxy: Proxy, echo_port: int) -> None:
    proxy.change(Weather(cut_probability=1.0))
    with connect(echo_port) as connection:
        assert len(answer(connection, b"x" * 1000)) < 1000
    wait_until(lambda: proxy.num_broken > 0)


def test_heavy_loss_resets_connections_now_and_then(proxy: Proxy, echo_port: int) -> None:
    proxy.change(Weather(reset_probability=0.3))
    num_whole = num_reset = 0
    for _ in range(40):
        try:
            with connect(echo_port) as connection:
                found = answer(connection)
                num_whole, num_reset = num_whole + (found == b"hello"), num_reset + (found != b"hello")
        except ConnectionError:
            num_reset += 1
    assert num_whole >= 5
    assert num_reset >= 5


def test_a_delay_and_a_throttle_only_slow_down(proxy: Proxy, echo_port: int) -> None:
    proxy.change(Weather(delay_s=(0.05, 0.1), bytes_per_s=1e6))
    with connect(echo_port) as connection:
        started = time.monotonic()
        assert answer(connection) == b"hello"
        assert time.monotonic() - started >= 0.1


CLOCK = "import time; print(time.time(), time.monotonic())"


def test_the_shim_shifts_the_wall_clock_alone(tmp_path: Path) -> None:
    shim = Shim(tmp_path / "files", tmp_path / "controls")
    shim.control("clock").shift_clock(-7200)
    command = [sys.executable, "-c", CLOCK]
    done = subprocess.run(command, env=shim.environment("clock"), capture_output=True, text=True, check=True)
    wall, monotonic = map(float, done.stdout.split())
    assert time.time() - wall == pytest.approx(7200, abs=60)
    assert time.monotonic() - monotonic == pytest.approx(0, abs=60)


WRITES = """
import os, sys
for number in range(3):
    try:
        with open(f"{sys.argv[1]}/files/{number}", "wb") as file:
            file.write(b"x")
        print("written")
    except OSError as error:
        print(error.errno)
print(os.statvfs(sys.argv[1] + "/files").f_bavail == 0)
"""


@pytest.mark.parametrize(
    ("skip", "repeat", "said"),
    [
        (0, -1, [errno.ENOSPC] * 3),
        (1, 1, ["written", errno.ENOSPC, "written"]),
        (3, 1, ["written"] * 3),
    ],
)
def test_the_shim_strikes_where_it_was_told(tmp_path: Path, skip: int, repeat: int, said: list[object]) -> None:
    (tmp_path / "files").mkdir()
    shim = Shim(tmp_path / "files", tmp_path / "controls")
    control = shim.control("writer")
    control.fail(errno.ENOSPC, skip=skip, repeat=repeat, kinds=Kind.WRITE)
    command = [sys.executable, "-c", WRITES, str(tmp_path)]
    done = subprocess.run(command, env=shim.environment("writer"), capture_output=True, text=True, check=True)
    assert done.stdout.split() == [*map(str, said), "True"]
    assert control.num_struck == said.count(errno.ENOSPC)


@pytest.mark.parametrize("has_keys", [False, True], ids=["open", "keyed"])
def test_a_learner_under_hostile_fire_goes_on_and_loses_nothing(
    tiny_model: Path, tmp_path: Path, has_keys: bool
) -> None:
    keys = make_keys(tmp_path / "keys") if has_keys else None
    sections = {
        # Actors slower than the learner, and more leases than they take: some are there for thieves.
        "actor": {"engine": "simulated", "tokens_per_s": 4.0, "max_groups_in_flight": 1},
        "algorithm": {"max_staleness": 8},
        "eval": {"every_steps": 0},
        "network": {"keys": str(keys)} if keys else {},
    }
    site = Site(tmp_path / "site", tiny_model, sections, seed=5 + has_keys)
    try:
        site.start()
        site.wait_for_steps(2)
        report = besiege(site, num_messages=3000, num_connections=90, seed=1, keys=keys, key_name="hostile")
        assert site.stop() == 0
        found = audit(site.run_dir)
    finally:
        site.close()
    assert report.is_withstood, repr(report)
    assert report.memory_growth_bytes < 200 << 20, repr(report)
    assert found["violations"] == []


GOOD_REPORT = {
    "kills": 300,
    "kills_by_component": {"learner": 45},
    "faults_by_class": dict.fromkeys(COUNTS, 5),
    "crash_points": {"ledger full disk": 100},
    "training_again_s": {"count": 18, "p50": 5.2, "p99": 7.4, "max": 7.4},
    "black_hole_noticed_s": {"count": 6, "p50": 4.2, "p99": 4.5, "max": 4.5},
    "stopped_for_good": {"found": 5},
    "runs": 6,
    "runs_ended": 6,
    "receipts_checked": 5000,
    "is_audited": True,
    "conditions": {"scale": 1.0, "only": ""},
}


def test_a_report_that_shows_everything_meets_the_demands() -> None:
    assert unmet(GOOD_REPORT) == []
    assert unmet(GOOD_REPORT | {"kills": 10, "conditions": {"scale": 0.1, "only": ""}}) == []


@pytest.mark.parametrize(
    "worse",
    [
        {"kills": 199},
        {"kills_by_component": {"learner": 19}},
        {"faults_by_class": dict.fromkeys(COUNTS, 5) | {"eio": 4}},
        {"crash_points": {"ledger full disk": 0}},
        {"crash_points": {}},
        {"training_again_s": {"count": 18, "p99": 10.1}},
        {"black_hole_noticed_s": {"count": 6, "max": 5.1}},
        {"stopped_for_good": {"found": 4, "not found": 1}},
        {"runs_ended": 5},
        {"faults_by_class": {}, "conditions": {"scale": 0.1, "only": "eio"}},
        {"receipts_checked": 0},
        {"is_audited": False},
    ],
    ids=lambda worse: next(iter(worse)),
)
def test_a_report_that_falls_short_is_told_so_in_one_line(worse: dict[str, object]) -> None:
    (line,) = unmet(GOOD_REPORT | worse)
    assert "expected at" in line


SAID = "chord-local: chord-learner: ledger.sqlite: disk I/O error"


@pytest.mark.parametrize(
    ("fault", "name", "code", "line", "is_explained"),
    [
        ("kill_actor", "far-0", -9, "x", True),
        ("", "far-0", 0, "18:01:28 far-0 INFO leaving: the run is over", True),
        ("", "far-0", 0, "x", False),
        ("reset", "far-0", 1, "chord-actor: AssertionError", False),
        ("eio", "far-0", 1, "chord-actor: OSError: [Errno 5]", True),
        ("eio", "far-0", -11, "Segmentation fault", False),
        ("kill_supervisor", "chord-local", -9, "step 5", True),
        ("full_disk", "chord-local", 2, SAID, True),
        ("full_disk", "chord-local", 2, "step 5", False),
        ("full_disk", "chord-local", 2, "chord-local: learner ended with exit code 2 and could not write why, "
         "expected room on the disk of run/logs", True),
        ("kill_learner", "chord-local", 2, SAID, False),
    ],
)  # fmt: skip
def test_an_end_is_a_violation_where_no_fault_explains_it(
    tmp_path: Path, fault: str, name: str, code: int, line: str, is_explained: bool
) -> None:
    ends = Ends(tmp_path / "output.log")
    ends.fault = fault
    ends.note(name, code, line)
    assert bool(ends.complaints) != is_explained


def test_what_chord_local_mends_is_seen_all_the_same(tmp_path: Path) -> None:
    output = tmp_path / "output.log"
    ends = Ends(output)
    output.write_text(
        "actor-0 ended with signal SIGKILL: starting it again (log: a.log)\nstep 1/9  reward 0.1\n"
        "actor-1 ended with exit code 1: starting it again (chord-actor: KeyError: 7) (log: b.log)\nlearner ended wi"
    )
    ends.read()
    ends.fault = "stop_left"
    with output.open("a") as file:
        file.write("th signal SIGSEGV: starting it again (log: l.log)\nactor-0 has given no sign of life for 20 s\n")
    ends.read()
    assert ends.tally() == {"actor-0 -9": 1, "actor-1 1": 1, "learner -11": 1}
    assert len(ends.complaints) == 2
    assert "KeyError" in ends.complaints[0]


STUCK = """
import time
from pathlib import Path
from actors.environment import SingleTurn
from common.chat import ChatMessage

class Sticky(SingleTurn):
    def __init__(self, *, seed, mark):
        self.mark = Path(mark)

    def task(self, split, index):
        if not self.mark.exists():
            self.mark.touch()
            while True:
                time.sleep(1)
        return "a", [ChatMessage(role="user", content=f"Say {index}.")]

    def score(self, task, text):
        return 0.0
"""


def test_an_actor_whose_event_loop_is_stuck_says_so_and_is_started_again(tiny_model: Path, tmp_path: Path) -> None:
    packages = install_environment(tmp_path / "packages", STUCK, "sticky = my_package:Sticky")
    config = write_config(
        tmp_path, tiny_model, run={"num_actors": 1, "watchdog_s": 4.0}, algorithm={"preset": "grpo"},
        learner={"num_steps": 1}, environment={"name": "sticky", "options": {"mark": str(tmp_path / "mark")}},
        actor={"engine": "simulated"}, eval={"every_steps": 0},
    )  # fmt: skip
    with LocalRun(config, extra_path=packages) as run:
        run.finish()
    assert "actor-0 ended with exit code 1: starting it again" in run.output
    assert "the actor's event loop has not moved for" in run.output
