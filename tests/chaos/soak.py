"""`make soak`: one long run under a light mix of all faults and hostile load; memory of every component is watched."""

import json
import random
import shutil
import time
import tomllib
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from tests.chaos.__main__ import LAST_STEPS, conditions
from tests.chaos.faults import Faults, actor_logs
from tests.chaos.keys import make_keys
from tests.chaos.schedule import COUNTS, variants
from tests.chaos.siege import SiegeReport, besiege
from tests.chaos.site import RunFailed, Site
from tests.chaos.verdict import judge, tracebacks
from tests.tiny_model import make_tiny_model

MAX_GROWTH_BYTES = 200 << 20
CALM_S = 60.0
"""Without a fault, between two of them, on average."""
SIEGE_SHARE = 5 / 6
"""Of the time, at most; the rest belongs to the mix of faults."""
SAMPLE_S = 10.0
LIGHT = sorted(COUNTS.keys() - {"bit_flip", "truncation", "kill_all"})

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class MemoryWatch:
    """Unique set size of every component over the life of each of its processes."""

    def __init__(self) -> None:
        self._lives: dict[tuple[str, int], list[int]] = defaultdict(list)
        self._sampled_at = 0.0

    def sample(self, site: Site) -> None:
        """At most every SAMPLE_S."""
        if time.monotonic() - self._sampled_at < SAMPLE_S:
            return
        self._sampled_at = time.monotonic()
        for name, process in site.components().items():
            try:
                self._lives[name, process.pid].append(int(process.memory_full_info().uss))
            except psutil.Error:
                continue

    def complaints(self) -> list[str]:
        return [
            f"memory: {name} grew by {life['growth_mib']} MiB, expected at most {MAX_GROWTH_BYTES >> 20} MiB"
            for name, life in self.growth().items()
            if life["growth_mib"] > MAX_GROWTH_BYTES / 2**20
        ]

    def growth(self) -> dict[str, dict[str, float]]:
        """By component, of its longest life: MiB after the first minute, at the end, and between."""
        found: dict[str, dict[str, float]] = {}
        for name in sorted({name for name, _ in self._lives}):
            life = max((values for (other, _), values in self._lives.items() if other == name), key=len)
            settled = life[min(int(60 / SAMPLE_S), len(life) - 1)]
            found[name] = {
                "minutes": round(len(life) * SAMPLE_S / 60, 1),
                "settled_mib": round(settled / 2**20, 1),
                "end_mib": round(life[-1] / 2**20, 1),
                "growth_mib": round((life[-1] - settled) / 2**20, 1),
            }
        return found


class Soak:
    """The run, from its start to the verdict."""

    def __init__(
        self, folder: Path, *, seed: int, minutes: float, num_messages: int, num_connections: int, has_keys: bool
    ) -> None:
        self._started = time.monotonic()
        self._deadline = self._started + minutes * 60
        self._chance = random.Random(seed)
        self._num_messages, self._num_connections, self._seed = num_messages, num_connections, seed
        self._keys = make_keys(folder / "keys") if has_keys else None
        sections = variants()[0]
        if self._keys:
            sections["network"] = {**sections["network"], "keys": str(self._keys)}
        self.site = Site(folder / "run-0", make_tiny_model(folder / "model"), sections, seed=seed)
        self._faults = Faults(self._chance, self._say)
        self._watch = MemoryWatch()
        self._siege = SiegeReport()

    def run(self) -> dict[str, Any]:
        """Siege first, then the mix of faults until the time is up, then the end in peace."""
        site, problems = self.site, list[str]()
        try:
            site.start()
            self._faults.begin(site)
            site.wait_for_steps(10, limit_s=300)
            self._say(f"siege: {self._num_messages} messages, {self._num_connections} connections")
            self._siege = besiege(
                site, num_messages=self._num_messages, num_connections=self._num_connections, seed=self._seed,
                keys=self._keys, key_name="hostile", sample=self._watch.sample,
                minutes=max((self._deadline - time.monotonic()) / 60 * SIEGE_SHARE, 1),
            )  # fmt: skip
            self._say(str(self._siege))
            self._mix_faults()
            problems += self._end()
        except (RunFailed, psutil.Error, OSError) as error:
            problems.append(str(error))
        finally:
            logs = [*actor_logs(site), *site.run_dir.glob("logs/[el]*.log"), site.folder / "output.log"]
            site.close()
        if not self._siege.is_withstood or self._siege.memory_growth_bytes > MAX_GROWTH_BYTES:
            problems.append(f"siege: {self._siege}")
        site.ends.read()
        problems += self._faults.violations + site.ends.complaints + self._watch.complaints()
        return {
            "problems": problems,
            "siege": asdict(self._siege),
            "memory": self._watch.growth(),
            "kills": self._faults.kills.total(),
            "faults_by_class": dict(sorted(self._faults.struck.items())),
            "tracebacks": dict(tracebacks(logs)),
            "steps": site.steps(),
            "wall_s": round(time.monotonic() - self._started, 1),
            "conditions": {"seed": self._seed, **conditions()},
        }

    def _mix_faults(self) -> None:
        while time.monotonic() < self._deadline:
            calm_until = min(time.monotonic() + self._chance.expovariate(1 / CALM_S), self._deadline)
            while time.monotonic() < calm_until:
                self.site.tend()
                self._watch.sample(self.site)
                time.sleep(0.5)
            self._faults.strike(self._chance.choice(LIGHT))

    def _end(self) -> list[str]:
        """What is wrong at the end."""
        site = self.site
        problems = [f"chord-local ended with {code} when stopped"] if (code := site.stop()) else []
        last = site.steps() + LAST_STEPS
        site.start(f"learner.num_steps={last}")
        site.wait_until(lambda: site.is_over, f"the end at step {last}", limit_s=300)
        config = tomllib.loads((site.run_dir / "config.toml").read_text())
        verdict = judge(site.run_dir, actor_logs(site), config=config)
        self._say(f"{'clean' if verdict.is_clean else 'NOT CLEAN'}: {asdict(verdict)}")
        return problems if verdict.is_clean else [*problems, str(verdict)]

    def _say(self, line: str) -> None:
        minutes, left = (time.monotonic() - self._started) / 60, (self._deadline - time.monotonic()) / 60
        print(f"{minutes:5.1f} min  step {self.site.steps():5d}  left {max(left, 0):.0f} min  {line}", flush=True)


@app.command()
def soak(
    seed: Annotated[int, typer.Option(help="Everything that is drawn by chance follows from it.")] = 0,
    minutes: Annotated[float, typer.Option(help="How long it all takes; the siege at most 5/6 of it.")] = 60.0,
    num_messages: Annotated[int, typer.Option(help="Fuzzed messages.")] = 1_000_000,
    num_connections: Annotated[int, typer.Option(help="Hostile connections.")] = 10_000,
    has_keys: Annotated[bool, typer.Option("--keys/--no-keys", help="Whether the run's wire is authenticated.")] = True,
    out: Annotated[Path, typer.Option(help="Folder of the run and of soak.json; emptied first.")] = Path("runs/soak"),
) -> None:
    """Let a run go on for long among light faults and hostile peers, and see what it costs."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    report = Soak(
        out.resolve(), seed=seed, minutes=minutes, num_messages=num_messages, num_connections=num_connections,
        has_keys=has_keys,
    ).run()  # fmt: skip
    (out / "soak.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    raise typer.Exit(1 if report["problems"] else 0)


if __name__ == "__main__":
    app()
