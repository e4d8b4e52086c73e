"""The pods of an overlay as processes of this machine: their very commands, each at a loopback address of its own."""

import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from common.keys.folder import LEARNER
from tests.deploy.manifests import CLUSTERS, Pod, learner, pods
from tests.deploy.test_kubernetes import LARGEST_GOODBYE_S, MODULES
from tests.deploy.tools import ROOT
from tests.runs import audit

SMALL = [
    "algorithm.preset=grpo", "algorithm.group_size=2", "actor.engine=simulated", "sampling.max_tokens=6",
    "learner.num_steps=100000", "learner.groups_per_step=2", "learner.num_threads=1", "eval.every_steps=0",
]  # fmt: skip
"""What makes the overlay's run one for a test."""


LEARNERS_IP, ACTORS_IP = "127.0.57.1", "127.0.57.2"


def moved(words: list[str], place: Path) -> list[str]:
    """Paths of a pod as paths below `place`."""
    return [re.sub(r"(^|[\s=])/(keys|allowed|data|var|etc)\b", rf"\1{place}/\2", word) for word in words]


def prepare(pod: Pod, place: Path, made: Path) -> None:
    """Mount what the pod mounts, and run its init containers."""
    for folder in ("keys", "data", "var/lib/chord", "etc"):
        (place / folder).mkdir(parents=True)
    key = pod.secret["secretName"].removeprefix("chord-").removesuffix("-keys")
    for name in {f"{key}.secret", "learner.public"}:
        shutil.copy2(made / name, place / "keys")
    (place / "allowed").symlink_to(made / "allowed")
    (place / "etc" / "chord").symlink_to(CLUSTERS["cpu"])
    (place / "data" / "expert.sqlite").write_bytes(b"a store")
    for container in pod.spec.get("initContainers", ()):
        words = moved(pod.fill_in(container, [*container["command"], *container["args"]]), place)
        assert subprocess.run(words, capture_output=True).returncode == 1, "it must wait for a model"
        (place / "data" / "models").mkdir()
        for _ in range(2):  # a pod's init containers may run again
            subprocess.run(words, check=True, capture_output=True)


Start = Callable[[Pod], subprocess.Popen[bytes]]


@pytest.fixture
def start(tiny_model: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts the main container of a pod; whatever still runs at the end is killed."""
    made, running = tmp_path / "made", list[subprocess.Popen[bytes]]()
    subprocess.run([sys.executable, "-m", "common.keys", "create", made, LEARNER, "actors"], cwd=ROOT, check=True)
    server = learner(CLUSTERS["cpu"])

    def start(pod: Pod) -> subprocess.Popen[bytes]:
        place = tmp_path / pod.name
        prepare(pod, place, made)
        command, *words = moved(pod.command(), place)
        host = f"network.host={server.name}.{server.workload['spec']['serviceName']}"
        words = [f"network.host={LEARNERS_IP}" if word == host else word for word in words]
        line = [sys.executable, "-m", MODULES[command], *words, f"model.path={tiny_model}", *SMALL]
        with (tmp_path / f"{pod.name}.log").open("wb") as log:
            running.append(subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=log))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


def answer(pod: Pod, probe: str) -> int:
    """What the kubelet would get."""
    get = pod.main[probe]["httpGet"]
    try:
        with urllib.request.urlopen(f"http://{pod.ip}:{pod.ports[get['port']]}{get['path']}", timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def wait_until(is_reached: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 300
    while not is_reached():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)


def test_pods_meet_answer_their_probes_and_drain(start: Start, tmp_path: Path) -> None:
    server = replace(learner(CLUSTERS["cpu"]), ip=LEARNERS_IP)
    actor = replace(pods(CLUSTERS["cpu"], "chord-actor")[0], ip=ACTORS_IP)
    serving, sampling = start(server), start(actor)
    for pod in (server, actor):
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            wait_until(lambda pod=pod, probe=probe: answer(pod, probe) == 200, tmp_path / f"{pod.name}.log")

    listening = [one.laddr for one in psutil.Process(serving.pid).net_connections("tcp") if one.status == "LISTEN"]
    for_others = {address.port for address in listening if address.ip != "127.0.0.1"}  # there gloo listens to itself
    assert for_others == set(server.ports.values())

    hook = actor.main["lifecycle"]["preStop"]["exec"]["command"]
    script = re.sub(r"sleep \d+", "sleep 0", hook[-1].replace(" 1;", f" {sampling.pid};"))
    subprocess.run([*hook[:-1], script], check=True)
    drain_s = actor.config(CLUSTERS["cpu"]).actor.drain_s
    assert sampling.wait(drain_s + LARGEST_GOODBYE_S) == 0

    serving.terminate()
    assert serving.wait(180) == 0, (tmp_path / f"{server.name}.log").read_text()[-3000:]
    run = tmp_path / server.name / "var/lib/chord/run"
    assert (run / "checkpoints" / "newest").exists()
    assert (run.parent / "expert.sqlite").read_bytes() == b"a store"
    assert audit(run)["violations"] == []
