"""A siege: hostile peers, in a process of their own, against the learner of a site, which must go on as before."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests.chaos.site import LEARNER_HOST, Site

SETTLE_S = 5.0
SUMS = ("messages", "refused", "wall_s", "joined", "leases", "let_in", "answered")
"""What is added up over the processes of hostile peers."""


@dataclass
class SiegeReport:
    """What was sent, and what it did to the learner."""

    num_messages: int = 0
    num_connections: int = 0
    """As many as were wanted."""
    sent: dict[str, Any] = field(default_factory=dict[str, Any])
    crashes: int = 0
    """Learners that ended meanwhile."""
    memory_growth_bytes: int = 0
    """Of the learner's unique set size, from before the siege to its highest value."""
    memory_left_bytes: int = 0
    """The same, to some seconds after it."""
    steps: int = 0
    """Optimizer steps that were finished meanwhile."""
    longest_pause_s: float = 0.0
    """Longest time without a step."""
    refused: dict[str, int] = field(default_factory=dict[str, int])
    """Messages and connections that the learner says it refused, by fault, as its metrics have it at the end."""

    @property
    def num_arrived(self) -> int:
        """Messages that the learner is known to have read: it answered or refused them."""
        return self.sent["answered"] + sum(self.refused.values())

    @property
    def is_whole(self) -> bool:
        """All that was wanted was sent; thieves were let in and given leases, and most of their messages arrived."""
        sent = self.sent
        return (
            sent["messages"] >= self.num_messages
            and sum(sent["connections"].values()) >= self.num_connections
            and min(sent["joined"], sent["leases"], sent["let_in"]) > 0
            and self.num_arrived >= sent["let_in"] / 2
        )

    @property
    def is_withstood(self) -> bool:
        return bool(self.sent) and self.is_whole and self.crashes == 0 and self.steps > 0


def besiege(
    site: Site, *, num_messages: int, num_connections: int, seed: int, minutes: float = 60.0, key_name: str = "",
    keys: Path | None = None, sample: Callable[[Site], None] = lambda _: None,
) -> SiegeReport:  # fmt: skip
    """Attack the learner of `site` while it trains; `sample` is called again and again meanwhile."""
    report = SiegeReport(num_messages=num_messages, num_connections=num_connections)
    pid, first_step = site.pid("learner"), site.steps()
    options = ["--config", str(site.run_dir / "config.toml")]
    attackers = _Attackers(site, [*options, "--keys", str(keys), "--key-name", key_name] if keys else options)
    before, deadline = _memory(pid), time.monotonic() + minutes * 60
    ended_at, stepped_at, step = 0.0, time.monotonic(), first_step
    try:
        while not ended_at or time.monotonic() - ended_at < SETTLE_S:
            site.tend()
            sample(site)
            if (now_pid := site.pid("learner")) != pid:
                report.crashes, pid, before = report.crashes + 1, now_pid, _memory(now_pid)
            report.memory_left_bytes = _memory(pid) - before
            report.memory_growth_bytes = max(report.memory_growth_bytes, report.memory_left_bytes)
            report.longest_pause_s = max(report.longest_pause_s, time.monotonic() - stepped_at)
            if site.steps() != step:
                stepped_at, step = time.monotonic(), site.steps()
            if not ended_at and not attackers.go_on(num_messages, num_connections, seed, until=deadline):
                ended_at = time.monotonic()
            time.sleep(0.25)
    finally:
        attackers.close()
    report.sent = attackers.sent
    report.steps = site.steps() - first_step
    report.refused = _refusals(site)
    report.longest_pause_s = round(report.longest_pause_s, 1)
    return report


class _Attackers:
    """One process of hostile peers after another, because libzmq aborts one now and then."""

    def __init__(self, site: Site, options: list[str]) -> None:
        self._site, self._options = site, options
        self._process: subprocess.Popen[bytes] | None = None
        self._said = site.folder / "hostile.jsonl"
        self.sent: dict[str, Any] = {"connections": {}, "processes": 0, **dict.fromkeys(SUMS, 0)}

    def go_on(self, num_messages: int, num_connections: int, seed: int, *, until: float) -> bool:
        """False where everything was sent, or the time is up."""
        if self._process and self._process.poll() is None:
            return True
        if self._process:
            self._take_report()
        num_messages -= self.sent["messages"]
        num_connections -= sum(self.sent["connections"].values())
        left_s = until - time.monotonic()
        if left_s <= 0 or (num_messages <= 0 and num_connections <= 0):
            return False
        self.sent["processes"] += 1
        command = [
            sys.executable, "-m", "tests.chaos.hostile", LEARNER_HOST, *map(str, self._site.ports),
            "--seed", str(seed + self.sent["processes"]), "--num-messages", str(max(num_messages, 0)),
            "--num-connections", str(max(num_connections, 0)), "--minutes", str(left_s / 60), *self._options,
        ]  # fmt: skip
        with self._said.open("wb") as said, (self._site.folder / "hostile.log").open("ab") as errors:
            self._process = subprocess.Popen(command, stdout=said, stderr=errors, env=dict(os.environ))
        return True

    def _take_report(self) -> None:
        lines = [line for line in self._said.read_text().splitlines() if line.endswith("}")]
        assert lines, f"the hostile peers failed: {(self._site.folder / 'hostile.log').read_text()[-1000:]}"
        found = json.loads(lines[-1])
        for name in SUMS:
            self.sent[name] += found[name]
        self.sent["connections"] = dict(Counter(self.sent["connections"]) + Counter(found["connections"]))

    def close(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
            self._take_report()


def _refusals(site: Site) -> dict[str, int]:
    found = re.findall(r"metrics: (http://\S+)", (site.run_dir / "logs" / "learner.log").read_text(errors="replace"))
    with urllib.request.urlopen(found[-1], timeout=10) as reply:
        families = text_string_to_metric_families(reply.read().decode())
    refused = [sample for family in families for sample in family.samples if "refused" in sample.name]
    return {" ".join(sample.labels.values()): int(sample.value) for sample in refused}


def _memory(pid: int) -> int:
    """Unique set size in bytes; 0 where the process has gone."""
    try:
        return int(psutil.Process(pid).memory_full_info().uss)
    except psutil.Error:
        return 0
