"""chord-local's live view: what a person needs is on the screen, whatever its size and whatever the files hold."""

import io
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from common.local.display import LiveView, PlainLines
from common.local.progress import Progress
from common.local.screen import View, draw
from common.local.supervisor import Component
from common.local.trends import BLOCKS, MAX_KEPT, Series, draw_trend
from common.run_dir import RunDir

NAMES = ("learner", "actor-0", "actor-1", "evaluator")
NUM_STEPS = 40


def step_line(step: int, **values: Any) -> dict[str, Any]:
    return {
        "step": step, "reward_mean": step / NUM_STEPS, "groups_with_signal_frac": 0.5, "staleness_mean": 1.0,
        "staleness_max": 2, "mu": 1 - step / NUM_STEPS, "policy_loss": 0.01, "expert_loss": 2.0 / step,
        "expert_nll_mean": 1.5, "policy_entropy": 0.7, "answer_tokens_mean": 9.0, "grad_norm": 1.25,
        "num_policy_tokens": 96.0, "num_expert_tokens": 64.0, "actor_tokens_per_s": 55.0, "learner_tokens_per_s": 22.0,
        "learner_wait_frac": 0.25, "actor_idle_frac": 0.5, "step_s": 3.0, "run_wall_s": 3.0 * step, "time": time.time(),
    } | values  # fmt: skip


def evaluation_line(step: int, accuracy: float, task: str = "chain_sum") -> dict[str, Any]:
    return {
        "step": step, "task": task, "accuracy": accuracy, "confidence_95": [accuracy - 0.05, accuracy + 0.05],
        "num_correct": int(200 * accuracy), "num_problems": 200, "samples_per_problem": 1, "wall_s": 6.0,
    }  # fmt: skip


def peer(name: str, **values: Any) -> dict[str, Any]:
    role = "evaluator" if name == "evaluator" else "actor"
    return {
        "peer_id": name, "role": role, "engine": "vllm", "state": "serving", "serving_step": 12, "sampled_tokens": 0,
        "silence_s": 0.2,
    } | values  # fmt: skip


def board(**values: Any) -> dict[str, Any]:
    return {
        "phase": "training", "step": 13, "num_steps": NUM_STEPS, "waiting_for": "2 of 6 groups of step 14",
        "groups": {"leased": 6, "committed": 4, "trained": 78}, "dropped": {"stale": 2}, "evaluations_owed": [10],
        "sinks_failed": {}, "peers": [peer(name) for name in NAMES[1:]],
    } | values  # fmt: skip


class Site:
    """A run directory that a test writes as a learner would, and the view of it."""

    def __init__(self, folder: Path) -> None:
        self.run_dir = RunDir(folder)
        self.components = [Component(name, [], Path(os.devnull)) for name in NAMES]
        self.progress = Progress(self.run_dir)
        self.news: list[str] = []

    def write_board(self, **values: Any) -> None:
        self.run_dir.status.write_text(json.dumps(board(**values)))

    def add_lines(self, path: Path, *lines: dict[str, Any]) -> None:
        with path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))

    def train(self, num_steps: int) -> None:
        self.add_lines(self.run_dir.metrics, *(step_line(step) for step in range(1, num_steps + 1)))

    def read(self) -> list[str]:
        return self.progress.read_news() + self.progress.read_steps()

    def screen(self, width: int = 80, height: int = 24) -> list[str]:
        """As a terminal of that size shows it; nothing may go beyond its edges."""
        self.read()
        view = View("runs/demo, chord_mu", NUM_STEPS, self.progress, self.components, self.news)
        console = Console(width=width, height=height, file=io.StringIO(), force_terminal=True, color_system=None)
        with console.capture() as captured:
            console.print(draw(view, width=width, height=height), height=height, end="")
        lines = captured.get().splitlines()
        assert len(lines) <= height
        assert all(len(line) <= width for line in lines)
        return lines

    def end(self, name: str, *, code: int | None = None) -> None:
        """A process of that name ends so; None: it is killed."""
        command = ["sleep", "60"] if code is None else ["sh", "-c", f"exit {code}"]
        process = subprocess.Popen(command)
        if code is None:
            process.kill()
        process.wait()
        self.components[NAMES.index(name)].process = process

    def close(self) -> None:
        for component in self.components:
            component.signs.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()


def line_with(lines: list[str], text: str) -> str:
    (found,) = [line for line in lines if text in line]
    return found


def row_of(lines: list[str], name: str) -> str:
    return line_with(lines, f"│ {name} ")


def blocks_of(line: str) -> str:
    return "".join(sign for sign in line if sign in BLOCKS)


def test_a_run_that_has_just_begun_says_so(site: Site) -> None:
    lines = site.screen()
    assert len(lines) == 24
    assert f"step 0/{NUM_STEPS}" in lines[1]
    assert "learner: starting" in lines[2]
    assert line_with(lines, "no step yet")
    for name in NAMES[1:]:
        assert "starting" in row_of(lines, name)


def test_eighty_by_twenty_four_holds_what_happens_what_is_waited_for_trends_and_everybody(site: Site) -> None:
    site.train(13)
    site.add_lines(site.run_dir.evaluations, evaluation_line(0, 0.1), evaluation_line(10, 0.4))
    site.write_board(peers=[peer("actor-0"), peer("actor-1", serving_step=11, silence_s=7.4), peer("evaluator")])
    lines = site.screen()
    assert "step 13/40" in lines[1]
    assert "about 81 s left" in lines[1]
    assert "training after step 13, waits for 2 of 6 groups of step 14" in lines[2]
    assert "6 leased, 4 committed; dropped: 2 stale; to evaluate: version 10" in lines[3]
    assert "0.325" in line_with(lines, "reward")
    assert "0.400" in line_with(lines, "held-out accuracy")
    assert "25%" in line_with(lines, "learner idle")
    assert "50%" in line_with(lines, "actors idle")
    for label in ("μ ", "policy loss", "expert loss"):
        assert blocks_of(line_with(lines, label))
    assert "version 12" in row_of(lines, "actor-0")
    assert "silent for 7 s" in row_of(lines, "actor-1")
    rising, falling = blocks_of(line_with(lines, "reward")), blocks_of(line_with(lines, "μ "))
    assert (rising[0], rising[-1], falling[0], falling[-1]) == ("▁", "█", "█", "▁")


def test_a_larger_screen_shows_more_and_a_smaller_one_what_matters_most(site: Site) -> None:
    site.train(30)
    site.add_lines(site.run_dir.evaluations, *(evaluation_line(10, 0.5, task) for task in ("sums", "mmlu_pro")))
    site.write_board()
    site.news = ["actor-0 joined: it samples with the vllm engine"]
    small, usual, large = site.screen(44, 16), site.screen(), site.screen(160, 50)
    for lines in (small, usual, large):
        assert line_with(lines, "step 30/40")
        assert line_with(lines, "training after step 13")
        assert blocks_of(line_with(lines, "reward"))
        assert line_with(lines, "joined: it samples")
    assert not [line for line in usual if "gradient norm" in line]
    assert line_with(large, "gradient norm")
    assert "0.025 … 0.750" in line_with(large, "reward")
    assert blocks_of(line_with(large, "sums"))
    assert blocks_of(line_with(large, "mmlu_pro"))
    assert len(blocks_of(line_with(large, "reward"))) > len(blocks_of(line_with(small, "reward")))


def test_a_loss_that_is_no_number_is_not_hidden(site: Site) -> None:
    site.train(3)
    site.add_lines(site.run_dir.metrics, step_line(4, policy_loss=float("nan"), expert_loss=float("inf")))
    assert "nan" in line_with(site.screen(), "policy loss")
    assert "inf" in line_with(site.screen(), "expert loss")


def test_a_run_that_evaluates_at_its_end_says_what_it_waits_for(site: Site) -> None:
    site.train(NUM_STEPS)
    waited = "evaluations of versions [40]"
    site.write_board(phase="evaluating", step=NUM_STEPS, waiting_for=waited, groups={"trained": 240}, dropped={})
    lines = site.screen()
    assert f"evaluating after step 40, waits for {waited}" in lines[2]
    assert "left" not in lines[1]
    assert "none under way" in lines[3]


def test_an_actor_that_is_lost_is_seen_to_be_before_the_learner_knows(site: Site) -> None:
    site.train(13)
    site.write_board()
    site.end("actor-1")
    lines = site.screen()
    assert "crashed: signal SIGKILL" in row_of(lines, "actor-1")
    assert "serving" in row_of(lines, "actor-0")
    site.end("learner", code=1)
    assert "learner crashed: exit code 1" in site.screen()[2]


def test_a_run_that_has_ended_says_so(site: Site) -> None:
    site.train(NUM_STEPS)
    site.write_board(
        phase="ended", step=NUM_STEPS, waiting_for="", groups={}, dropped={}, evaluations_owed=[], peers=[]
    )
    lines = site.screen()
    assert "ended after step 40" in lines[2]
    assert all("leaving" in row_of(lines, name) for name in NAMES[1:])
    for name in NAMES:
        site.end(name, code=0)
    lines = site.screen()
    assert all("ended" in row_of(lines, name) for name in NAMES[1:])


def test_a_fleet_that_does_not_fit_is_counted(site: Site) -> None:
    site.write_board(peers=[peer(f"far-{i}", state="fitting" if i % 10 == 0 else "serving") for i in range(60)])
    lines = site.screen()
    assert "starting" in row_of(lines, "actor-0")
    rest = line_with(lines, "more")
    assert "serving" in rest
    assert "6 fitting" in rest


def test_a_board_that_is_no_longer_written_is_said_to_be_old(site: Site) -> None:
    site.write_board()
    written = time.time() - 300
    os.utime(site.run_dir.status, (written, written))
    assert re.search(r"learner: 30\d s ago: training after step 13", site.screen()[2])


def test_what_peers_say_is_shown_as_it_stands(site: Site) -> None:
    site.write_board(peers=[peer("[/red]", engine="[bold]", state="[/]")])
    assert "[/]" in line_with(site.screen(), "[/red]")


def test_the_speed_of_an_actor_is_what_it_sampled_of_late(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    site.write_board(peers=[peer("actor-0", sampled_tokens=1000)])
    monkeypatch.setattr("common.local.progress.time.monotonic", lambda: began)
    site.read()
    site.write_board(peers=[peer("actor-0", sampled_tokens=1240)])
    monkeypatch.setattr("common.local.progress.time.monotonic", lambda: began + 1.2)
    site.read()
    assert site.progress.tokens_per_s("actor-0") == pytest.approx(200)
    site.write_board(peers=[peer("actor-0", sampled_tokens=3)])  # another process of that name
    site.read()
    assert site.progress.tokens_per_s("actor-0") == 0


def test_news_are_told_once_and_what_was_on_record_before_is_not(site: Site) -> None:
    site.train(3)
    site.progress = Progress(site.run_dir)
    assert site.progress.num_steps_before == 3
    assert site.read() == []
    site.add_lines(site.run_dir.metrics, step_line(4))
    site.add_lines(site.run_dir.evaluations, evaluation_line(4, 0.5))
    site.write_board(peers=[peer("actor-0")], dropped={"poison": 1}, sinks_failed={"wandb": "CommError: no network"})
    said = site.read()
    assert [line.split()[0] for line in said] == ["actor-0", "1", "nothing", "accuracy", "step"]
    assert "nothing more goes to wandb: CommError: no network" in said
    assert "accuracy of version 4 on chain_sum: 0.500 [0.450, 0.550] (100 of 200 problems, 6 s)" in said
    assert said[-1].startswith("step 4/40  reward 0.100  signal 50%  staleness 1.0 (max 2)  μ 0.900  expert nll 1.500")
    site.run_dir.metrics.write_text("".join(json.dumps(step_line(step)) + "\n" for step in (1, 2, 3, 4)))  # a restart
    assert site.read() == []


def test_a_half_written_line_is_read_when_it_is_whole(site: Site) -> None:
    whole = json.dumps(step_line(1)) + "\n"
    site.run_dir.metrics.write_text(whole[:40])
    assert site.read() == []
    with site.run_dir.metrics.open("a") as file:
        file.write(whole[40:])
    assert len(site.read()) == 1


GOOD = {
    "status.json": json.dumps(board()).encode(),
    "metrics.jsonl": "".join(json.dumps(step_line(step)) + "\n" for step in (1, 2, 3)).encode(),
    "eval.jsonl": json.dumps(evaluation_line(0, 0.5)).encode() + b"\n",
}
odd = st.none() | st.booleans() | st.floats() | st.integers(-(2**70), 2**70) | st.text(max_size=5) | st.just([1])


@st.composite
def damaged(draw_from: st.DrawFn) -> bytes:
    """A good file that was cut, overwritten, or has odd values."""
    content = draw_from(st.sampled_from(sorted(GOOD.values())))
    if draw_from(st.booleans()):
        line = json.loads(content.splitlines()[0])
        for name in draw_from(st.lists(st.sampled_from(sorted(line)), max_size=4)):
            line[name] = draw_from(odd)
        return json.dumps(line).encode() + b"\n"
    cut = draw_from(st.integers(0, len(content)))
    return content[:cut] + draw_from(st.binary(max_size=8)) + content[cut + draw_from(st.integers(0, 9)) :]


@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(files=st.fixed_dictionaries({}, optional={name: damaged() for name in GOOD}), size=st.sampled_from(
    [(1, 1), (20, 5), (80, 24), (200, 60)]))  # fmt: skip
def test_no_file_can_stop_the_view(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], size: tuple[int, int]
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    site = Site(folder)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    site.news = site.read()
    site.progress.now()
    site.screen(*size)
    site.close()


def test_a_trend_line_has_a_block_for_each_share_of_the_steps() -> None:
    points = [(step, float(step)) for step in range(8)]
    assert draw_trend(points, last_step=7, width=20, scale=(0.0, 7.0)) == BLOCKS
    assert draw_trend(points, last_step=7, width=4, scale=(0.0, 7.0)) == "▁▃▆█"
    assert draw_trend([(0, 1.0), (6, 2.0)], last_step=7, width=20, scale=(1.0, 2.0)) == "▁▁▁▁▁▁██"  # it goes on
    assert draw_trend([(4, 1.0)], last_step=7, width=8, scale=(1.0, 1.0)) == "    ▅▅▅▅"


def test_a_long_run_keeps_its_shape_in_bounded_memory() -> None:
    series = Series()
    for step in range(100_000):
        series.add(step, float(step))
    assert len(series.points) <= MAX_KEPT
    assert series.last == 99_999
    assert draw_trend(series.points, last_step=99_999, width=8, scale=(0.0, 99_999.0)) == BLOCKS
    steps = [step for step, _ in series.points]
    assert steps == sorted(steps)


def test_without_a_terminal_there_are_plain_lines() -> None:
    console = Console(file=io.StringIO(), width=40)
    with PlainLines(console, lambda: "") as display:
        display.say("[b]one line, however long it is, stays one line")
        display.say_step("step 1/4")
        display.show()
    assert console.file.getvalue() == "[b]one line, however long it is, stays one line\nstep 1/4\n"  # pyright: ignore


def test_the_last_news_stay_on_the_terminal_when_the_view_has_gone(site: Site) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24, color_system=None)
    view = View("run", NUM_STEPS, site.progress, site.components, ())
    with LiveView(console, lambda _: view) as display:
        display.say("actor-0 ended\x1b[2J with signal SIGKILL")
        display.say_step("step 1/4")
        display.show()
    _, _, left = console.file.getvalue().rpartition("\x1b[?1049l")  # pyright: ignore
    assert "actor-0 ended [2J with signal SIGKILL" in left
    assert "step 1/4" not in left
