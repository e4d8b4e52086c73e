"""chord-report in headless Chromium: opened, clicked, filtered, and compared with what the runs hold.

`visit.mjs` does what a person would, once; each test asks one thing of what was to be seen. The screenshots lie in
pytest's temporary folder.
"""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from learner.excerpts.folder import ExcerptFolder
from learner.report.pieces import Pieces
from tests.deploy.tools import TOOLS
from tests.report_runs import GROUP_SIZE, make_run
from tests.runs import run_module
from tests.tiny_model import make_tiny_model

NUM_STEPS = (320, 20)
"""Of the two runs in the page; the first alone has 5,120 trajectories, and 640 demonstrations."""
MAX_OPEN_MS = 2000
"""The same for what is searched and sorted, which takes a tenth of it: a page that hangs is not quick."""
PER_STEP = 2 * GROUP_SIZE + 2
TEXTS = {"text": "tokens", "asked": "prompt"}
"""What becomes text of a row of the excerpts."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    model = make_tiny_model(folder / "model")
    return [make_run(folder / f"run-{n}", model, num_steps=steps, seed=n) for n, steps in enumerate(NUM_STEPS)]


@pytest.fixture(scope="module")
def rows(runs: list[Path]) -> list[dict[str, Any]]:
    """What the excerpts of both runs hold, with their text."""
    paths = [path for run in runs for path in ExcerptFolder(run / "excerpts").files().values()]
    pieces = Pieces(runs[0].parent / "model")
    rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
    return [
        {**row, **{key: b"".join(map(pieces.bytes_of, row[of])).decode() for key, of in TEXTS.items()}} for row in rows
    ]


@pytest.fixture(scope="module")
def seen(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    screenshots = tmp_path_factory.mktemp("screenshots")
    page = runs[0].parent / "compared.html"
    run_module("learner.report", *map(str, runs), "--output", str(page))
    script = Path(__file__).with_name("visit.mjs")
    command = ["node", script, TOOLS / "node" / "node_modules", page, screenshots, str(MAX_OPEN_MS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return {"page": page, **json.loads(done.stdout)}


def in_group(row: dict[str, Any]) -> bool:
    return row["group_id"] is not None


def alpha(color: str) -> float:
    """Of a CSS color; 0 where there is none."""
    found = re.search(r"rgba\(.*, ([\d.]+)\)", color)
    return float(found.group(1)) if found else 0.0


def test_a_page_of_5000_trajectories_opens_in_less_than_2_s(seen: dict[str, Any]) -> None:
    assert NUM_STEPS[0] * 2 * GROUP_SIZE > 5000
    assert min(opening["all"] for opening in seen["openMs"]) < MAX_OPEN_MS, seen["openMs"]


def test_it_asks_for_nothing_but_itself_and_makes_no_mistake(seen: dict[str, Any]) -> None:
    assert set(seen["requests"]) == {seen["page"].as_uri()}
    assert seen["errors"] == []
    assert not seen["isWiderThanItsWindow"]


def test_the_charts_say_what_the_steps_were(seen: dict[str, Any], runs: list[Path]) -> None:
    charts = seen["charts"]
    assert {
        "Reward", "Held-out accuracy", "Losses", "μ", "φ", "Policy entropy", "Mismatch KL", "Staleness",
        "Staleness of groups", "Answer length", "Who waited for whom", "Tokens per second", "Weight bytes",
    } <= set(charts["titles"])  # fmt: skip
    assert all(num_marks for num_marks, _ in charts["drawn"].values()), charts["drawn"]
    evaluations = sum(len((run / "eval.jsonl").read_text().splitlines()) for run in runs)
    assert charts["drawn"]["Held-out accuracy"][1] == evaluations
    assert [name.strip() for name in charts["runs"]] == ["run-0", "run-1"]
    last = json.loads((runs[0] / "metrics.jsonl").read_text().splitlines()[-1])
    assert charts["facts"][1:4] == ["chord_phi", "1", "320 of 321"]
    assert charts["hovered"].startswith(f"step 320: run-0 {last['reward_mean']:.3g} · run-1 ")
    assert charts["description"].startswith("Reward. run-0 reward: from ")
    assert charts["atHome"].startswith("step 1: ")
    assert charts["oneRight"].startswith("step 2: ")


def test_runs_are_laid_over_another_and_can_be_hidden(seen: dict[str, Any]) -> None:
    charts = seen["charts"]
    assert (charts["linesOfTwo"], charts["linesOfOne"], charts["linesOfNone"]) == (2, 1, 0)
    assert "run-1" not in charts["hoveredOne"]
    assert charts["linesSmoothed"] == 4
    assert re.match(r"hours [\d.]+: run-0 ", charts["hoveredHours"])


def test_the_list_holds_everything_and_draws_what_is_in_sight(seen: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    found = seen["list"]
    assert seen["chartsHidden"]
    assert found["all"] == f"{len(rows)} of {len(rows)}"
    assert len(rows) == sum(NUM_STEPS) * PER_STEP
    assert 10 < found["rowsDrawn"] < 80
    assert {2000, 2010} <= set(found["scrolledTo"])
    assert found["clicked"] == "2004"


def test_search_and_filters_let_through_what_they_say(seen: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    found = seen["list"]
    assert found["searched"] == f"{sum('Łódź' in row['text'] for row in rows)} of {len(rows)}"
    assert "Łódź" in found["searchedAnswer"]
    assert set(found["marked"]) == {"łódź"}
    assert found["nothing"] == [f"0 of {len(rows)}", "Nothing is like that."]
    asked = sum("Question 1: where" in row["asked"] for row in rows)
    assert found["searchedPrompts"] == f"{asked} of {len(rows)}"
    answers = [row for row in rows if in_group(row)]
    assert found["sample"] == f"All {len(answers):,} trajectories that were trained on."
    assert found["withSignal"] == f"{sum(row['advantage'] != 0 for row in answers)} of {len(rows)}"
    assert found["unrewarded"] == f"{sum(row['reward'] <= 0.5 for row in answers)} of {len(rows)}"
    rewarded = [row for row in answers if row["reward"] >= 0.5 and row["step"] <= 5]
    assert found["filtered"] == f"{len(rewarded)} of {len(rows)}"
    assert set(found["filteredRewards"]) == {"1"}
    assert found["ofRun"] == f"{NUM_STEPS[1] * 2 * GROUP_SIZE} of {len(rows)}"
    assert found["truncated"] == f"{sum(row['is_truncated'] for row in answers)} of {len(rows)}"


def test_thousands_of_trajectories_are_searched_and_sorted_at_once(seen: dict[str, Any]) -> None:
    assert seen["list"]["searchMs"] < MAX_OPEN_MS
    assert seen["list"]["sortMs"] < MAX_OPEN_MS


def test_a_click_on_a_heading_sorts(seen: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    found = seen["list"]
    assert found["advantagesDown"] == sorted(found["advantagesDown"], reverse=True)
    assert found["advantagesUp"] == sorted(found["advantagesUp"])
    assert found["advantagesUp"][0] < 0 < found["advantagesDown"][0]
    far = np.abs(np.log(found["ratios"]))
    assert (np.diff(far) <= 0.01).all()
    assert far[0] == pytest.approx(max(np.abs(log_ratios(row)).max() for row in rows if in_group(row)), abs=0.02)


def log_ratios(row: dict[str, Any]) -> np.ndarray:
    return np.array(row["policy_logprobs"]) - row["behavior_logprobs"]


def test_the_keyboard_goes_through_the_list(seen: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    num_answers = sum(map(in_group, rows))
    assert seen["list"]["lastSelected"] == str(num_answers)
    assert seen["list"]["oneUp"] == str(num_answers - 1)


def test_the_answers_of_a_group_stand_side_by_side_with_their_numbers(
    seen: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    group, mine = seen["group"], rows[:GROUP_SIZE]
    assert group["title"] == f"run-0, step 1, group {mine[0]['group_id']} from actor-0"
    assert "where does the train go?" in group["prompt"]
    assert group["answers"] == [row["text"] for row in mine]
    first, second = group["boxes"][:2]
    assert first["top"] == second["top"]
    assert first["right"] <= second["left"]
    for row, facts in zip(mine, group["facts"], strict=True):
        assert f"reward {row['reward']:g}" in facts
        assert f"tokens {len(row['tokens'])}" in facts
        shown = re.search(r"advantage (−?-?[\d.]+)", facts)
        assert shown
        assert float(shown.group(1)) == pytest.approx(row["advantage"], abs=0.01)


def test_tokens_are_coloured_by_their_ratio_and_say_it(seen: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    group, logs = seen["group"], log_ratios(rows[0])
    octaves = np.abs(logs) / np.log(2)
    assert [alpha(color) for color in group["ratioColors"]] == pytest.approx(0.65 * np.minimum(octaves, 1), abs=0.01)
    is_blue = np.array(["0, 114, 178" in color for color in group["ratioColors"]])
    assert (is_blue == (logs >= 0))[octaves > 0.02].all()
    assert f"ratio {np.exp(logs[3]):.3f}"[:-1] in group["hovered"]
    assert group["hovered"].startswith('token 4 "h" · π_θ ')
    assert group["oneRight"].startswith('token 5 "i" · π_θ ')


def test_tokens_are_coloured_by_the_version_that_sampled_them(seen: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    group = seen["group"]
    row = next(row for row in rows if row["step"] == 7)
    assert group["versionAnswer"] == row["text"]
    assert group["versionLegend"] == ["6 (0 old)", "5 (1 old)"]
    newest, *_, oldest = sorted(zip(row["versions"], group["versionColors"], strict=True), reverse=True)
    assert (newest[0], oldest[0]) == (6, 5)
    assert len(set(zip(row["versions"], group["versionColors"], strict=True))) == 2


def test_expert_rows_show_phi_for_every_token(seen: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    group = seen["group"]
    experts = [row for row in rows if not in_group(row)]
    assert group["experts"] == f"{len(experts)} of {len(rows)}"
    row = next(row for row in experts if f"expert row {row['expert_row_id']}" in group["expertTitle"])
    assert group["expertText"] == row["text"]
    p = np.exp(np.array(row["policy_logprobs"]))
    phi = p * (1 - p)
    assert [alpha(color) for color in group["expertColors"]] == pytest.approx(0.65 * phi / 0.25, abs=0.01)
    shown = re.search(r"φ ([\d.]+)", group["expertHovered"])
    assert shown
    assert float(shown.group(1)) == pytest.approx(phi[2], abs=0.002)
    assert "weight here" in group["expertHovered"]
