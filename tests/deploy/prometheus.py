"""A Prometheus of our own, with the configuration of `deploy/prometheus/` and its clock made faster."""

import json
import math
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.rules import PROMETHEUS

INTERVAL = "1s"


class Prometheus:
    """Runs until it is left; `targets`: ports by job."""

    def __init__(self, folder: Path, *, port: int, run: str, targets: Mapping[str, Sequence[int]]) -> None:
        self._address = f"http://127.0.0.1:{port}"
        shutil.copytree(PROMETHEUS, folder)
        config = yaml.safe_load((folder / "prometheus.yml").read_text())
        config["global"] |= {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL}
        del config["alerting"]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        for path in (folder / "targets").iterdir():
            path.unlink()
        groups = [
            {"labels": {"run": run, "job": job}, "targets": [f"127.0.0.1:{port}" for port in ports]}
            for job, ports in targets.items()
        ]
        (folder / "targets" / "run.yml").write_text(yaml.safe_dump(groups))
        self._log = (folder / "prometheus.log").open("w+")
        command = [
            "prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)

    def __enter__(self) -> "Prometheus":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log.close()

    def get(self, path: str, **parameters: str) -> Any:
        """What its API answers. Raises where it says no."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self._address}/api/v1/{path}?{query}", timeout=10) as reply:
            return json.load(reply)["data"]

    def numbers(self, expression: str) -> list[float]:
        """Values of an expression now, those that are numbers."""
        values = [float(series["value"][1]) for series in self.get("query", query=expression)["result"]]
        return [value for value in values if not math.isnan(value)]

    def wait_until_ready(self, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                urllib.request.urlopen(f"{self._address}/-/ready", timeout=5).close()
                return
            except OSError:
                assert self._process.poll() is None, Path(self._log.name).read_text()
                assert time.monotonic() < deadline, "Prometheus does not start"
                time.sleep(0.1)
