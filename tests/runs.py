"""Real runs for the system tests: configuration, processes, and what they left behind."""

import atexit
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

PATIENCE_S = 600.0
"""With what starts several processes that import torch, however busy the machine is."""
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def write_config(folder: Path, model: Path, **sections: dict[str, Any]) -> Path:
    """A run of a tiny model with transformers engines, small enough for a test; `sections` override."""
    base: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run"), "num_actors": 2},
        "model": {"path": str(model)},
        "environment": {"name": "reasoning_gym", "options": {"family": "chain_sum", "min_terms": 2, "max_terms": 2}},
        "sampling": {"max_tokens": 6},
        "actor": {"engine": "transformers", "max_model_tokens": 256, "max_groups_in_flight": 1},
        "algorithm": {"preset": "chord_phi", "max_staleness": 1, "group_size": 2},
        "learner": {"num_steps": 4, "groups_per_step": 2, "lr": 1e-4, "checkpoint_every_steps": 2},
        "network": {"port": 0, "lease_s": 4.0},
        "expert": {"path": str(folder / "expert.sqlite"), "rows_per_step": 3},
        "eval": {"every_steps": 2, "num_problems": 8},
    }
    for section, values in sections.items():
        base.setdefault(section, {}).update(values)
    path = folder / "config.toml"
    path.write_text(
        "\n".join(
            f"[{name}]\n" + "".join(f"{k} = {_toml(v)}\n" for k, v in values.items()) for name, values in base.items()
        )
    )
    return path


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


def import_experts(config: Path, num_rows: int = 40) -> None:
    """By chord-expert, into the store that `config` names; tests of equal models and tasks share what one imported."""
    sections = tomllib.loads(config.read_text())
    store = Path(sections["expert"]["path"])
    shutil.copyfile(_imported(config, num_rows, repr((sections["model"], sections["environment"]))), store)


_stores: dict[tuple[int, str], Path] = {}


def _imported(config: Path, num_rows: int, task: str) -> Path:
    if (num_rows, task) not in _stores:
        store = Path(tempfile.mkdtemp(prefix="experts-")) / "expert.sqlite"
        atexit.register(shutil.rmtree, store.parent)
        rows = ["--num-rows", str(num_rows), "--config", str(config), f"expert.path={store}"]
        run_module("learner.expert", "import", "reasoning_gym", *rows)
        _stores[num_rows, task] = store
    return _stores[num_rows, task]


def run_module(
    module: str, *arguments: str, timeout_s: float = PATIENCE_S, check: bool = True
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, env={**os.environ, **QUIET}, check=False
    )
    assert not check or done.returncode == 0, (
        f"{module} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done


class LocalRun:
    """`chord-local` as a child process; on leaving, it and all that it started must be gone."""

    def __init__(self, config: Path, *arguments: str, extra_path: Path | None = None) -> None:
        self.folder = config.parent / "run"
        self._output = (config.parent / "output.log").open("a+b")
        environment = {**os.environ, **QUIET}
        if extra_path:
            environment["PYTHONPATH"] = f"{extra_path}{os.pathsep}{os.getcwd()}"
        command = [sys.executable, "-m", "common.local", "--config", str(config), *arguments]
        self.process = subprocess.Popen(command, stdout=self._output, stderr=self._output, env=environment)

    def __enter__(self) -> "LocalRun":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            left = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            self.process.wait()
            psutil.wait_procs(left, timeout=60)  # who notice that it is gone
        self._output.close()

    @property
    def output(self) -> str:
        said = (self.folder.parent / "output.log").read_text()
        logs = "".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.folder.glob("logs/*.log")))
        return said + logs

    def finish(self, timeout_s: float = PATIENCE_S) -> None:
        assert self.process.wait(timeout_s) == 0, self.output

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def components(self) -> dict[str, psutil.Process]:
        """Running processes by component name."""
        found: dict[str, psutil.Process] = {}
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.NoSuchProcess):  # one that just ended
                words = child.cmdline()
                if "-m" in words:
                    name = words[words.index("--name") + 1] if "--name" in words else words[words.index("-m") + 1]
                    found[name] = child
        return found

    def wait_until(self, is_reached: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_reached():
            assert self.process.poll() is None, f"it ended early:\n{self.output}"
            assert time.monotonic() < deadline, f"not reached within {timeout_s} s:\n{self.output}"
            time.sleep(0.05)

    def kill(self, name: str) -> None:
        """Kill a component, and wait for the process that takes its place."""
        killed = self.components()[name]
        killed.kill()
        self.wait_until(lambda: name in (now := self.components()) and now[name].pid != killed.pid)

    def num_steps_done(self) -> int:
        return len(read_lines(self.folder / "metrics.jsonl"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read_summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def audit_groups(folder: Path) -> list[dict[str, Any]]:
    with sqlite3.connect(folder / "ledger.sqlite") as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute("SELECT * FROM audit_groups ORDER BY group_id")]


def audit(folder: Path) -> dict[str, Any]:
    """What chord-audit says of a run; a fault in it is printed."""
    done = run_module("learner.audit", str(folder), "--json", check=False)
    report = json.loads(done.stdout) if done.stdout else {"violations": [done.stderr]}
    assert (done.returncode == 0) == (not report["violations"]), done.stderr
    return report


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Longer writes of this process fail, as on a disk without room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
