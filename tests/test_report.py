"""chord-report, without a browser: what the page says is what the run left behind (tests/deploy looks at it in one)."""

import base64
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from learner.excerpts.folder import ExcerptFolder
from learner.report.charts import MAX_POINTS, make_charts
from learner.report.pieces import Pieces
from learner.report.run import read_run
from tests.report_runs import PLACES, make_run
from tests.runs import LocalRun, import_experts, run_module, write_config

NUM_STEPS = 6


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Path:
    return make_run(tmp_path / "one", tiny_model, num_steps=NUM_STEPS)


class Page:
    """What a browser would find in the file."""

    def __init__(self, path: Path) -> None:
        self.html = path.read_text(encoding="utf-8")
        self.known: dict[str, Any] = json.loads(self._unpack("known"))
        data = self._unpack("tokens")
        self.columns = {
            name: np.frombuffer(data, dtype=one["kind"], count=one["length"], offset=one["start"])
            for name, one in self.known["layout"].items()
        }
        ends = np.cumsum(self.columns["pieceSizes"]).tolist()
        pieces = self.columns["pieces"].tobytes()
        self.vocabulary = [pieces[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _unpack(self, name: str) -> bytes:
        found = re.search(rf'id="{name}">([A-Za-z0-9+/=]+)</script>', self.html)
        assert found
        return gzip.decompress(base64.b64decode(found.group(1)))

    def text(self, column: str, span: list[int]) -> str:
        return b"".join(self.vocabulary[place] for place in self.columns[column][slice(*span)]).decode()

    def series(self, title: str) -> list[dict[str, Any]]:
        return next(chart["series"] for chart in self.known["charts"] if chart["title"] == title)

    def answers(self, *, of_experts: bool) -> list[dict[str, Any]]:
        groups = self.known["groups"]
        return [one for one in self.known["answers"] if groups[one["group"]]["isExpert"] == of_experts]


def report(*run_dirs: Path, options: tuple[str, ...] = ()) -> Page:
    output = run_dirs[0].parent / "report.html"
    run_module("learner.report", *map(str, run_dirs), "--output", str(output), *options)
    return Page(output)


def test_every_answer_of_the_excerpts_is_in_the_page_with_its_numbers(run: Path) -> None:
    page = report(run)
    rows = [row for path in ExcerptFolder(run / "excerpts").files().values() for row in pq.read_table(path).to_pylist()]
    assert len(page.known["answers"]) == len(rows) == NUM_STEPS * (2 * 8 + 2)
    texts = set[str]()
    for answer, row in zip(page.known["answers"], rows, strict=True):
        group, span = page.known["groups"][answer["group"]], slice(*answer["tokens"])
        assert group["step"] == row["step"]
        assert group["id"] == (row["group_id"] or row["expert_row_id"])
        assert page.text("prompts", group["prompt"]).startswith("<|im_start|>user\nQuestion ")
        texts.add(page.text("tokens", answer["tokens"]))
        np.testing.assert_allclose(page.columns["policy"][span] / 1000, row["policy_logprobs"], atol=6e-4)
        if row["group_id"] is None:
            p = np.exp(row["policy_logprobs"])
            assert answer["phi"] == pytest.approx(float((p * (1 - p)).mean()), rel=1e-3)
            continue
        assert (answer["reward"], answer["isTruncated"]) == (row["reward"], row["is_truncated"])
        assert answer["advantage"] == pytest.approx(row["advantage"], rel=1e-3)
        assert answer["staleness"] == row["step"] - 1 - min(row["versions"])
        assert page.columns["versions"][span].tolist() == row["versions"]
        ratios = np.exp(np.array(row["policy_logprobs"]) - row["behavior_logprobs"])
        assert answer["ratio"] == pytest.approx(float(ratios[np.abs(np.log(ratios)).argmax()]), rel=1e-3)
    assert all(any(place in text for text in texts) for place in PLACES)


def test_every_chart_that_people_ask_for_is_there_for_every_run(run: Path, tiny_model: Path) -> None:
    page = report(run, make_run(run.parent / "two", tiny_model, num_steps=4, seed=1))
    assert [one["name"] for one in page.known["runs"]] == ["one", "two"]
    expected = {
        "Reward", "Held-out accuracy", "Losses", "μ", "φ", "Expert tokens decided", "−log p of expert tokens",
        "Policy entropy", "Mismatch KL", "Importance correction", "Groups and answers", "Gradient norm", "Staleness",
        "Staleness of groups", "Answer length", "Who waited for whom", "Tokens per second", "Seconds of a step",
        "Weight bytes", "Trajectory bytes",
    }  # fmt: skip
    for title in expected:
        assert {series["run"] for series in page.series(title)} == {0, 1}, title
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    reward = page.series("Reward")[0]
    assert reward["x"] == [line["step"] for line in lines]
    assert reward["y"] == pytest.approx([line["reward_mean"] for line in lines], rel=1e-5, abs=1e-9)
    assert [series["label"] for series in page.series("μ")] == ["μ", "effective μ"] * 2
    accuracy = page.series("Held-out accuracy")[0]
    assert [high - low for low, high in zip(accuracy["low"], accuracy["high"], strict=True)] == pytest.approx(
        [0.12] * len(accuracy["x"])
    )
    assert page.series("Weight bytes")[0]["y"] == [270_000_000] * NUM_STEPS
    assert sum(page.series("Staleness of groups")[0]["y"]) == pytest.approx(1)


def test_the_page_asks_nobody_for_anything_and_shows_text_as_text(run: Path) -> None:
    page = report(run)
    assert "default-src 'none'" in page.html
    assert set(re.findall(r"https?://[^\"' ]+", page.html)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(src|href)=(?!\"#)", page.html)
    assert page.html.count("</script>") == 3, "an answer that would end a script stands in the page as it is"


def test_a_run_that_goes_on_can_be_looked_at(tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, tiny_model, actor={"engine": "simulated"}, learner={"num_steps": 10_000, "num_threads": 1}
    )
    import_experts(config)
    with LocalRun(config) as local:
        local.wait_until(lambda: local.num_steps_done() >= 3)
        page = report(local.folder)
        local.stop()
        local.finish()
    (known,) = page.known["runs"]
    assert known["facts"]["state"].startswith("going on: ")
    assert known["notes"] == []
    assert len(page.series("Reward")[0]["x"]) >= 3
    assert {series["label"] for series in page.series("Answer lengths, sampled against trained")} == {
        "sampled", "trained",
    }  # fmt: skip
    assert len(page.answers(of_experts=False)) >= 3 * 4
    assert len(page.answers(of_experts=True)) >= 3 * 2
    assert report(local.folder).known["runs"][0]["facts"]["state"] == "stopped"


def test_groups_that_came_too_late_stand_beside_those_that_were_trained_on(run: Path) -> None:
    found = read_run(run, name="one")
    trained = sum(count for line in found.lines for count in line["staleness_histogram"].values())
    (chart,) = [one for one in make_charts([replace(found, num_too_old=trained)]) if one.title == "Staleness of groups"]
    sampled, of_trained = chart.series
    assert (sampled["x"], sampled["y"]) == ([0, 1, 2], pytest.approx([1 / 6, 2 / 6, 3 / 6]))
    assert (of_trained["label"], of_trained["y"]) == ("trained", pytest.approx([1 / 3, 2 / 3]))


def test_long_groups_that_were_sampled_and_not_trained_on_show_in_the_histogram_of_lengths(run: Path) -> None:
    found = replace(read_run(run, name="one"), answer_lengths=[(12.0, True), (12.5, True), (47.9, False), (48.0, True)])
    title = "Answer lengths, sampled against trained"
    (chart,) = [one for one in make_charts([found]) if one.title == title]
    sampled, trained = chart.series
    assert sampled["x"] == trained["x"] == [2.0 * n for n in range(25)]  # the longest has 48 tokens
    assert {n: share for n, share in enumerate(sampled["y"]) if share} == {6: 1 / 2, 23: 1 / 2}
    assert {n: share for n, share in enumerate(trained["y"]) if share} == pytest.approx({6: 2 / 3, 23: 1 / 3})


def test_the_page_says_how_many_of_the_trajectories_it_holds(run: Path, tiny_model: Path) -> None:
    assert report(run).known["sample"] == "All 96 trajectories that were trained on."
    half = make_run(run.parent / "half", tiny_model, num_steps=4, groups_per_step=1)
    assert report(half).known["sample"].startswith("32 of 64 trajectories that were trained on: of each step ")


def test_several_runs_want_a_file_for_their_page(run: Path) -> None:
    done = run_module("learner.report", str(run), str(run), check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "chord-report: --output: got none for 2 runs, expected the page's file"


def test_a_line_that_is_being_written_is_left_for_later(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rew')
    assert report(run).series("Reward")[0]["x"][-1] == NUM_STEPS


def test_a_long_run_is_thinned_to_the_points_that_a_chart_can_show(run: Path) -> None:
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    steps = range(1, 5 * MAX_POINTS + 1)
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({**line, "step": step, "reward_mean": float(step)}) + "\n" for step in steps)
    )
    reward = report(run).series("Reward")[0]
    assert len(reward["y"]) == MAX_POINTS
    assert reward["y"][:2] == [3.0, 8.0], "expected the mean of five neighbours"
    assert reward["x"][-1] == 5 * MAX_POINTS


def test_steps_are_left_out_evenly_where_there_are_too_many_tokens(run: Path) -> None:
    everything = report(run)
    num_tokens = len(everything.columns["tokens"])
    page = report(run, options=("--max-tokens", str(num_tokens // 2 + num_tokens // 20)))
    assert sorted({group["step"] for group in page.known["groups"]}) == [2, 4, 6]
    assert page.known["numLeftOut"] == 3 * 18


def test_what_cannot_be_read_is_said_and_the_rest_is_shown(run: Path) -> None:
    (run / "excerpts" / "step-00000002.parquet").write_bytes(b"PAR1 cut")
    (run / "ledger.sqlite").write_bytes(b"no ledger")
    config = run / "config.toml"
    config.write_text(re.sub(r'(\[model\]\npath = )".*"', r'\1"/nowhere"', config.read_text()))
    page = report(run)
    notes = page.known["runs"][0]["notes"]
    assert any("step-00000002.parquet" in note for note in notes)
    assert any("ledger.sqlite" in note for note in notes)
    assert any("no /nowhere/tokenizer.json here: tokens are shown as numbers" in note for note in notes)
    assert len(page.known["answers"]) == (NUM_STEPS - 1) * 18
    assert re.fullmatch(r"(⟨\d+⟩)+", page.text("tokens", page.known["answers"][0]["tokens"]))


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("config.toml", "holds no config.toml, expected the run.dir of a run whose learner has started"),
        ("metrics.jsonl", "metrics.jsonl:2: "),
    ],
)
def test_what_is_no_run_ends_with_one_line(run: Path, file: str, expected: str) -> None:
    lines = (run / file).read_text().splitlines(keepends=True)
    (run / file).unlink()
    if file == "metrics.jsonl":
        (run / file).write_text(lines[0] + "no JSON\n")
    done = run_module("learner.report", str(run), check=False)
    assert done.returncode == 2
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (run / "report.html").exists()


def test_pieces_joined_are_the_text_that_the_tokenizer_read(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = "Zürich → 東京 🙂\n\ttab <|im_end|>"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    pieces = [Pieces(tiny_model).bytes_of(token) for token in tokens]
    assert b"".join(pieces).decode() == text
    assert len(tokens) > len(text) / 2, "expected letters cut into bytes"


def test_pieces_of_a_sentencepiece_vocabulary_are_text_too(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "▁the": 1, "▁": 2, "cat": 3, **{f"<0x{byte:02X}>": 4 + byte for byte in range(256)}}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
                "pre_tokenizer": None, "post_processor": None,
                "decoder": {
                    "type": "Sequence",
                    "decoders": [
                        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                        {"type": "ByteFallback"}, {"type": "Fuse"},
                    ],
                },
                "model": {
                    "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                    "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": True, "vocab": vocabulary,
                    "merges": [],
                },
            }
        )
    )  # fmt: skip
    pieces, heart = Pieces(tmp_path), [4 + byte for byte in "♥".encode()]
    assert b"".join(pieces.bytes_of(token) for token in [1, 2, 3, *heart]).decode() == " the cat♥"
