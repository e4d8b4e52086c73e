"""What a thousand actors cost the learner, and what a second rank gains: the figures that extrapolations begin from."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.bench.cargo import GROUP_SIZE
from tests.bench.doors import front_door, opened
from tests.bench.figure import Bar, Figure
from tests.bench.fleet import MAX_PROCESSES, Load, sail
from tests.bench.rank import ANSWER_TOKENS, NUM_GROUPS, NUM_STEPS, PROMPT_TOKENS

FLEETS = (1, 10, 100, 1000)
GROUPS_PER_S = 250.0
"""Of a fleet, however large it is: the same work from more and more identities."""
SECONDS = 8.0
FLAT = Bar(at_most=1.25)
MODEL = Path("models/smollm2-135m")
RANKS_S = 400


def measure(say: Callable[[str], None]) -> list[Figure]:
    return [*fleets(say), *ranks(say)]


def fleets(say: Callable[[str], None]) -> list[Figure]:
    """The same work from 1, 10, 100 and 1,000 identities, and 1,000 that do nothing but ask."""
    loads = {size: load_of(size, GROUPS_PER_S, say) for size in FLEETS}
    idle = load_of(FLEETS[-1], 0.0, say)
    smallest = loads[FLEETS[0]]
    figures: list[Figure] = []
    for size, load in loads.items():
        conditions = (
            f"{load.num_groups / load.seconds:.0f} groups/s of K = {GROUP_SIZE} for {load.seconds:g} s, in "
            f"{min(size, MAX_PROCESSES)} processes; each identity asks for work once a second or more often"
        )
        figures += [
            Figure(
                f"learner, {size} actors", "CPU ms/trajectory", cost_ms(load), "1 actor", cost_ms(smallest),
                FLAT if size > 1 else None, conditions,
            ),
            Figure(
                f"learner, {size} actors", "MiB resident", load.after.resident_bytes / 2**20, "before the load",
                load.before.resident_bytes / 2**20, Bar(at_most=1.1),
            ),
        ]  # fmt: skip
    share = 1000 * idle.cpu_s / idle.seconds / FLEETS[-1]
    waiting = Figure(f"learner, {FLEETS[-1]} actors that only ask", "CPU ms/actor/s", share)
    return [*figures, waiting]


def load_of(size: int, groups_per_s: float, say: Callable[[str], None]) -> Load:
    with tempfile.TemporaryDirectory(dir=".") as folder, opened(front_door, Path(folder)) as door:
        load = sail(door, size, groups_per_s=groups_per_s, seconds=SECONDS)
    say(
        f"{size} actors: {load.num_groups} groups, {load.cpu_s:.2f} s of CPU, "
        f"{load.after.resident_bytes / 2**20:.0f} MiB"
    )
    return load


def cost_ms(load: Load) -> float:
    return 1000 * load.cpu_s / max(load.num_groups, 1) / GROUP_SIZE


def ranks(say: Callable[[str], None]) -> list[Figure]:
    """The same optimizer steps on one rank and on two, each on a core of its own."""
    seconds = {count: rank_seconds(count) for count in (1, 2)}
    for count, found in seconds.items():
        say(f"{count} ranks: " + ", ".join(f"{took:.2f} s" for took in found))
    tokens = NUM_GROUPS * (PROMPT_TOKENS + GROUP_SIZE * ANSWER_TOKENS)
    conditions = (
        f"{MODEL.name}, {NUM_GROUPS} groups of K = {GROUP_SIZE}, {PROMPT_TOKENS} + {ANSWER_TOKENS} tokens, one core a "
        f"rank; median of {NUM_STEPS} steps; 1: {min(seconds[1]):.1f} to {max(seconds[1]):.1f} s, "
        f"2: {min(seconds[2]):.1f} to {max(seconds[2]):.1f} s"
    )
    one, two = (tokens / statistics.median(seconds[count]) for count in (1, 2))
    return [Figure("optimizer step on 2 ranks", "computed tokens/s", two, "1 rank", one, None, conditions)]


def rank_seconds(count: int) -> list[float]:
    """Of each timed step."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        done = subprocess.run(
            [*command, "-m", "tests.bench.rank", str(MODEL), str(report)],
            capture_output=True, text=True, timeout=RANKS_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(report.read_text())
