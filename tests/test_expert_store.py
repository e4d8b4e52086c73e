"""The expert store, its sampler and `chord-expert`: real SQLite files, real processes."""

import json
import os
import re
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.chat import ChatMessage
from common.config.load import resolve_config
from common.errors import ConfigError, OperatorError
from common.problems import ReasoningProblems, split_of
from learner.expert.importing import (
    BadRow,
    DemonstrationColumns,
    PromptForm,
    Response,
    read_jsonl,
    read_reasoning_gym,
    read_tables,
)
from learner.expert.sampler import draw, permutation
from learner.expert.store import ExpertStore, NewRow, store_path
from tests.runs import run_module, write_config

CHAIN_SUM = ["environment.options.family=chain_sum"]
FEW_QUESTIONS = [f"environment.options.{key}" for key in ("family=chain_sum", "max_terms=2", "max_digits=1")]
FEW_QUESTIONS += ["environment.options.min_digits=1"]
unhurried = settings(deadline=None, max_examples=60, derandomize=True)


def row(question: str, answer: str = "yes", source: str = "test") -> NewRow:
    turns = (ChatMessage(role="user", content=question), ChatMessage(role="assistant", content=answer))
    return NewRow(turns, source)


def write_lines(path: Path, values: Iterable[object]) -> Path:
    path.write_text("".join(f"{value if isinstance(value, str) else json.dumps(value)}\n" for value in values))
    return path


def prompts(num_rows: int) -> list[dict[str, str]]:
    return [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(num_rows)]


def run(*arguments: object, limit: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "learner.expert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, preexec_fn=limit)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ExpertStore]:
    with closing(ExpertStore(tmp_path / "expert.sqlite", create=True)) as opened:
        yield opened


@unhurried
@given(st.integers(1, 40), st.integers(0, 2**63), st.integers(0, 5))
def test_an_epoch_draws_every_row_once(num_rows: int, seed: int, epoch: int) -> None:
    drawn = draw(num_rows, seed=seed, cursor=epoch * num_rows, count=num_rows)
    assert sorted(drawn) == list(range(num_rows))


@unhurried
@given(st.integers(1, 30), st.integers(0, 9), st.lists(st.integers(0, 70), max_size=6))
def test_draws_resumed_from_any_cursor_equal_an_uninterrupted_one(num_rows: int, seed: int, counts: list[int]) -> None:
    resumed: list[int] = []
    for count in counts:
        resumed += draw(num_rows, seed=seed, cursor=len(resumed), count=count)
    assert resumed == draw(num_rows, seed=seed, cursor=0, count=sum(counts))


@unhurried
@given(st.integers(20, 60), st.integers(0, 2**63), st.integers(0, 9))
def test_epochs_and_seeds_have_permutations_of_their_own(num_rows: int, seed: int, epoch: int) -> None:
    here = permutation(num_rows, seed=seed, epoch=epoch).tolist()
    assert here != permutation(num_rows, seed=seed, epoch=epoch + 1).tolist()
    assert here != permutation(num_rows, seed=seed + 1, epoch=epoch).tolist()


def test_permutations_are_the_ones_that_earlier_runs_drew() -> None:
    assert draw(10, seed=0, cursor=0, count=20) == [1, 0, 3, 4, 7, 9, 2, 5, 8, 6, 8, 9, 5, 2, 7, 0, 3, 6, 4, 1]
    assert draw(10, seed=7, cursor=0, count=10) == [5, 9, 8, 6, 0, 1, 2, 7, 3, 4]


def test_each_row_is_as_likely_at_each_place() -> None:
    firsts = [draw(4, seed=seed, cursor=0, count=1)[0] for seed in range(4000)]
    assert all(abs(firsts.count(position) - 1000) < 130 for position in range(4))  # 4.7 deviations


@pytest.mark.parametrize(("num_rows", "cursor", "count"), [(0, 0, 1), (3, -1, 1), (3, 0, -1)])
def test_impossible_draws_are_refused(num_rows: int, cursor: int, count: int) -> None:
    with pytest.raises(ValueError, match=r"got .* expected"):
        draw(num_rows, seed=0, cursor=cursor, count=count)


def test_rows_are_read_in_the_order_asked_for(store: ExpertStore) -> None:
    store.add([row("a"), row("b"), row("c")])
    assert [r.messages[0].content for r in store.read([3, 1, 3])] == ["c", "a", "c"]
    assert store.row_ids() == [1, 2, 3]
    with pytest.raises(OperatorError, match=r"row 9: got none, expected"):
        store.read([1, 9])


def test_the_same_messages_are_added_once_whatever_their_source(store: ExpertStore) -> None:
    first = store.add([row("a"), row("b"), row("a", source="elsewhere")])
    second = store.add([row("b"), row("a", answer="no"), row("c")])
    assert (first.num_added, first.num_duplicates) == (2, 1)
    assert (second.num_added, second.num_duplicates) == (2, 1)
    assert store.row_ids() == [1, 2, 3, 4]


def test_any_text_comes_back_as_it_went_in(store: ExpertStore) -> None:
    texts = ["", "μ ≠ φ 🎻", 'quote " and \\ and\nnewline\r\n', "nul \0 after", "'; DROP TABLE rows; --", " \u2028 "]
    store.add(row(text, answer=text + "!") for text in texts)
    assert [r.messages[0].content for r in store.rows()] == texts
    assert list(store.verify()) == []


def test_an_error_while_rows_are_read_adds_none_of_them(store: ExpertStore) -> None:
    def broken() -> Iterator[NewRow]:
        yield row("a")
        raise OperatorError("the rows ended badly")

    with pytest.raises(OperatorError, match="ended badly"):
        store.add(broken())
    assert store.row_ids() == []
    assert store.add([row("a")]).num_added == 1


def test_a_long_import_does_not_hold_up_a_run_that_records_its_uses(store: ExpertStore) -> None:
    store.add([row("a")])
    with closing(ExpertStore(store.path)) as of_the_run:

        def slowly() -> Iterator[NewRow]:
            yield row("b")
            of_the_run.record_uses("run", 0, [1])
            yield row("c")

        store.add(slowly())
        assert of_the_run.use_counts() == {1: 1, 2: 0, 3: 0}


def test_uses_of_a_replayed_step_count_once(store: ExpertStore) -> None:
    store.add([row("a"), row("b"), row("c")])
    for _ in range(2):
        store.record_uses("run", 0, [1, 2, 1])
        store.record_uses("run", 1, [2])
    store.record_uses("another run", 0, [2])
    assert store.use_counts() == {1: 2, 2: 3, 3: 0}


def test_a_step_taken_again_with_other_rows_counts_as_it_was_taken_last(store: ExpertStore) -> None:
    store.add([row("a"), row("b")])
    store.record_uses("run", 0, [1])
    store.record_uses("run", 0, [2])
    assert store.use_counts() == {1: 0, 2: 1}


def test_stats_count_rows_sources_characters_and_uses(store: ExpertStore) -> None:
    store.add([row("four", "1"), row("four", "22", source="other"), row("four", "333")])
    store.record_uses("run", 0, [1, 1, 2])
    stats = store.stats()
    assert (stats.num_rows, stats.rows_per_source) == (3, {"test": 2, "other": 1})
    assert (stats.total_chars, stats.mean_chars) == (18, 6.0)
    assert (stats.min_uses, stats.mean_uses, stats.max_uses, stats.num_never_used) == (0, 1.0, 2, 1)


def test_an_empty_store_has_stats_too(store: ExpertStore) -> None:
    stats = store.stats()
    assert (stats.num_rows, stats.mean_chars, stats.mean_uses, stats.max_uses) == (0, 0.0, 0.0, 0)


def test_the_fingerprint_tells_content_and_order_but_not_uses(tmp_path: Path) -> None:
    def fingerprint(name: str, *rows: NewRow) -> str:
        with closing(ExpertStore(tmp_path / name, create=True)) as opened:
            opened.add(rows)
            opened.record_uses("run", len(name), opened.row_ids())
            return opened.fingerprint()

    one = fingerprint("1", row("a"), row("b"))
    assert one == fingerprint("22", row("a"), row("b"))
    assert len({one, fingerprint("3", row("b"), row("a")), fingerprint("4", row("a")), fingerprint("5")}) == 4


def test_a_store_survives_closing_and_is_durable_by_default(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "what? #1.sqlite"
    for create in (True, True, False):
        with closing(ExpertStore(path, create=create)) as opened:
            opened.add([row("a")])
            assert opened.row_ids() == [1]
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_missing_store_is_named_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match=r"gone\.sqlite: got no such file, expected an expert store"):
        ExpertStore(tmp_path / "gone.sqlite")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("create", [False, True])
def test_a_file_that_is_no_store_is_named_and_left_as_it_is(tmp_path: Path, create: bool) -> None:
    text = write_lines(tmp_path / "text.sqlite", ["this is no database " * 300])
    with closing(sqlite3.connect(tmp_path / "other.sqlite")) as database:
        database.execute("CREATE TABLE leases (id)")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OperatorError, match=r"text\.sqlite: got file is not a database, expected an expert store"):
        ExpertStore(text, create=create)
    with pytest.raises(OperatorError, match=r"other\.sqlite: got another kind of SQLite database, expected"):
        ExpertStore(tmp_path / "other.sqlite", create=create)
    with pytest.raises(OperatorError, match=r"^\S+: got [^\n]+, expected [^\n]+$"):
        ExpertStore(tmp_path, create=create)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_store_of_another_schema_is_refused(store: ExpertStore) -> None:
    store.close()
    with closing(sqlite3.connect(store.path)) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(OperatorError, match="got a store of schema 99, expected schema 1"):
        ExpertStore(store.path, create=True)


def test_a_flipped_byte_of_content_is_found_and_never_read(store: ExpertStore) -> None:
    store.add([row("a"), row("the needle"), row("c")])
    store.close()
    store.path.write_bytes(store.path.read_bytes().replace(b"needle", b"noodle"))
    with closing(ExpertStore(store.path)) as opened:
        assert [line.partition(": ")[2].split(":")[0] for line in opened.verify()] == ["row 2"]
        assert [r.row_id for r in opened.read([1, 3])] == [1, 3]
        for reading in (lambda: opened.read([2]), lambda: list(opened.rows()), opened.stats):
            with pytest.raises(OperatorError, match=r"expert\.sqlite: row 2: got messages that do not match"):
                reading()


def test_damaged_pages_are_told_in_one_line(store: ExpertStore) -> None:
    store.add(row("x" * 500 + str(i)) for i in range(100))
    store.close()
    content = store.path.read_bytes()
    store.path.write_bytes(content[:4096] + b"\xff" * (len(content) - 8192) + content[-4096:])
    with closing(ExpertStore(store.path)) as opened:
        lines = list(opened.verify())
        assert lines
        assert all(line.startswith(f"{store.path}: ") and "\n" not in line for line in lines)
        with pytest.raises(OperatorError, match=r"malformed, expected an undamaged store") as caught:
            list(opened.rows())
        assert "\n" not in str(caught.value)


def test_the_store_lies_in_the_run_directory_unless_a_path_is_given() -> None:
    assert store_path(resolve_config(None, ["run.dir=runs/a"]).config) == Path("runs/a/expert.sqlite")
    assert store_path(resolve_config(None, ["run.dir=runs/a", "expert.path=b.db"]).config) == Path("b.db")


@pytest.mark.parametrize(
    ("line", "mistake"),
    [
        ("{bad", 'got "{bad", expected a JSON object (key must be a string at column 2)'),
        ("[1]", "got [1], expected an object"),
        ({"text": "x"}, 'got no messages, expected "messages", or "prompt" and "response"'),
        ({"prompt": "x"}, 'got no messages, expected "messages", or "prompt" and "response"'),
        ({"prompt": 3, "response": "x"}, "prompt: got 3, expected a valid string"),
        ({"prompt": "x", "response": " \n"}, r'messages[1].content: got " \n", expected what the assistant says'),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            "messages[0].role: got \"bot\", expected 'system', 'user', 'assistant' or 'tool'",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content: got nothing, expected text"),
        (
            {"messages": [{"role": "user", "content": "x", "name": "y"}]},
            'messages[0].name: got "y", expected no keys but role and content',
        ),
        (
            {"messages": [{"role": "user", "content": "x"}]},
            'messages: got a last turn of role "user", expected "assistant"',
        ),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            'messages: got no turn of role "user" before the assistant\'s, expected one',
        ),
    ],
)
def test_a_bad_line_is_told_with_its_place(tmp_path: Path, line: object, mistake: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [*prompts(1), "", line])
    assert list(read_jsonl([path]))[1:] == [BadRow(f"{path}:3: {mistake}")]


def test_bytes_that_are_no_text_spoil_only_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(prompts(1)[0]).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n" + b'{"prompt": "\xff"}\n' + b"[" * 100_000 + b"\n" + good)
    assert [isinstance(r, BadRow) for r in read_jsonl([path])] == [False, True, True, False]


def test_a_system_prompt_goes_before_prompts_only(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write_lines(tmp_path / "rows.jsonl", [{"messages": messages, "id": 7}, *prompts(1)])
    rows = [r for r in read_jsonl([path], system_prompt="Be brief.") if isinstance(r, NewRow)]
    assert [[message.role for message in r.messages] for r in rows] == [
        ["user", "assistant"],
        ["system", "user", "assistant"],
    ]
    assert {r.source for r in rows} == {"rows.jsonl"}


def write_parquet(path: Path, rows: list[dict[str, object]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def turns_of(*rows: NewRow | BadRow) -> list[list[tuple[str, str]]]:
    return [[(m.role, m.content) for m in r.messages] for r in rows if isinstance(r, NewRow)]


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "q", "response": "a"},
        {"question": "q", "answer": "a", "id": 7},
        {"problem": "q", "solution": "a", "answer": "bare"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "prompt": "other"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ],
)
def test_tables_are_read_by_their_usual_columns(tmp_path: Path, values: dict[str, object]) -> None:
    lines = list(read_tables([str(write_lines(tmp_path / "a.jsonl", [values]))]))
    parquet = list(read_tables([str(write_parquet(tmp_path / "a.parquet", [values]))]))
    assert turns_of(*lines, *parquet) == [[("user", "q"), ("assistant", "a")]] * 2
    assert [r.source for r in lines + parquet if isinstance(r, NewRow)] == ["a.jsonl", "a.parquet"]


def test_a_dot_goes_into_the_object_of_a_column(tmp_path: Path) -> None:
    values = {"input": {"text": "1+1?", "rank": 1}, "output.text": "2"}
    columns = DemonstrationColumns(("input.text",), ("output.text",), (), ())
    for source in (write_lines(tmp_path / "a.jsonl", [values]), write_parquet(tmp_path / "a.parquet", [values])):
        assert turns_of(*read_tables([str(source)], columns=columns)) == [[("user", "1+1?"), ("assistant", "2")]]


def test_every_role_of_sharegpt_has_its_own_name_here(tmp_path: Path) -> None:
    roles = {"system": "system", "human": "user", "gpt": "assistant", "observation": "tool", "tool": "tool"}
    turns = [{"from": role, "value": "x"} for role in (*roles, "gpt")]
    path = write_lines(tmp_path / "a.jsonl", [{"conversations": turns}])
    assert [role for role, _ in turns_of(*read_tables([str(path)]))[0]] == [*roles.values(), "assistant"]


def test_turns_of_a_parquet_file_may_have_keys_without_a_value(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"messages": [{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "q", "name": "x"}, {"role": "assistant", "content": "a"}]},
    ]
    path = write_parquet(tmp_path / "a.parquet", rows)
    good, bad = read_tables([str(path)])
    assert turns_of(good) == [[("user", "q"), ("assistant", "a")]]
    assert bad == BadRow(f'{path} row 2: messages[0].name: got "x", expected no keys but role and content')


def test_columns_prompt_and_system_prompt_are_as_asked_for(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"q": "1+1", "a": "2", "messages": []}])
    columns = DemonstrationColumns(("q",), ("a",), ())
    form = PromptForm("Be brief.", "{question}\n\nUse \\boxed{}.")
    assert turns_of(*read_tables([str(path)], columns=columns, form=form)) == [
        [("system", "Be brief."), ("user", "1+1\n\nUse \\boxed{}."), ("assistant", "2")]
    ]


@pytest.mark.parametrize(
    ("values", "mistake"),
    [
        (
            {"text": "x", "id": 1},
            'got columns text, id, expected "messages" or "conversations", or "prompt" or "question" or "problem" and'
            ' "response" or "solution" or "answer" (--messages-column, --prompt-column and --response-column name'
            " others)",
        ),
        ({"question": "x", "answer": 3}, "answer: got 3, expected a valid string"),
        ({"conversations": "x"}, 'conversations: got "x", expected a list of turns'),
        ({"conversations": ["x"]}, 'conversations[0]: got "x", expected a valid dictionary or instance of ChatMessage'),
        (
            {"conversations": [{"from": "bot", "value": "x"}]},
            "conversations[0].role: got \"bot\", expected 'system', 'user', 'assistant' or 'tool'",
        ),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, 'conversations[0].role: got ["human"], expected \'sy'),
        ("[1]", "got [1], expected an object"),
        ("{bad", 'got "{bad", expected a JSON object (key must be a string at column 2)'),
    ],
)
def test_a_bad_row_of_a_table_is_told_with_its_place(tmp_path: Path, values: object, mistake: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*prompts(1), values, *prompts(1)])
    good, bad, last = read_tables([str(path)])
    assert isinstance(good, NewRow)
    assert isinstance(bad, BadRow)
    assert bad.line.startswith(f"{path}:2: {mistake}")
    assert isinstance(last, NewRow)


def test_questions_that_environments_hold_out_can_be_left_out(tmp_path: Path) -> None:
    questions = [f"{n}+{n}?" for n in range(80)]
    pairs = [{"question": question, "answer": "x"} for question in questions]
    talks = [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": "x"}]} for q in questions]
    kept = [question for question in questions if split_of(question) == "train"]
    assert 0 < len(kept) < 80
    asked = [{"conversations": [{"from": "human", "value": f"Answer: {q}"}, *talk["conversations"][1:]]}
             for q, talk in zip(questions, talks, strict=True)]  # fmt: skip
    for rows, template in (
        (pairs, "Answer: {question}"),
        (pairs, None),
        (talks, "{question}"),
        (asked, "Answer: {question}"),
    ):
        source = str(write_lines(tmp_path / "a.jsonl", rows))
        read = turns_of(*read_tables([source], form=PromptForm(template=template), leave_out_held_out=True))
        assert [turns[0][1].removeprefix("Answer: ") for turns in read] == kept


def test_held_out_questions_that_cannot_be_told_are_not_taken_for_others(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Answer: 1+1?"}, {"role": "assistant", "content": "2"}]
    source = write_lines(tmp_path / "a.jsonl", [{"messages": turns}])
    leave_out = ["import", "table", source, f"run.dir={tmp_path}", "--leave-out-held-out"]
    for more, words in {
        (): f'{source}:1: --leave-out-held-out: got "Answer: 1+1?", expected --prompt-template to be its form',
        ("--prompt-template", "Now: {question}"): 'got "Answer: 1+1?", expected --prompt-template to be its form',
        (
            "environment.options.held_out_source=b.jsonl",
        ): '--leave-out-held-out: got environment.options.held_out_source "b',
    }.items():
        failed = run(*leave_out, *more)
        assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (2, "", 1)
        assert words in failed.stderr
    assert not (tmp_path / "expert.sqlite").exists()


def test_tables_are_imported_by_the_command(tmp_path: Path) -> None:
    store_at = f"expert.path={tmp_path / 'expert.sqlite'}"
    lines = write_lines(tmp_path / "a.jsonl", [{"q": "1?", "a": "1"}, {"q": "2?"}])
    folder = tmp_path / "downloaded"
    folder.mkdir()
    write_parquet(folder / "train-0.parquet", [{"q": "3?", "a": "3"}])
    write_parquet(folder / "test-0.parquet", [{"q": "4?", "a": "4"}])
    options = ["--prompt-column", "q", "--response-column", "a", "--prompt-template", "Q: {question}"]
    stopped = run("import", "table", lines, folder, store_at, *options)
    assert (stopped.returncode, stopped.stdout) == (2, "")
    assert f"{lines}:2: got columns q, expected" in stopped.stderr
    assert not (tmp_path / "expert.sqlite").exists(), "an empty store would be taken for one"
    done = run("import", "table", lines, folder, store_at, *options, "--skip-bad-rows")
    assert done.stdout.startswith("imported 2 rows into")
    with closing(ExpertStore(tmp_path / "expert.sqlite")) as store:
        assert turns_of(*[NewRow(r.messages, r.source) for r in store.rows()]) == [
            [("user", f"Q: {n}?"), ("assistant", f"{n}")] for n in (1, 3)
        ]
    with_split = run("import", "table", folder, store_at, *options, "--split", "test")
    assert with_split.stdout.startswith("imported 1 rows into")


def test_what_was_left_out_as_held_out_is_told(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", prompts(40))
    num_held_out = sum(split_of(row["prompt"]) == "held_out" for row in prompts(40))
    done = run("import", "table", source, f"run.dir={tmp_path}", "--leave-out-held-out")
    told, counts = done.stdout.splitlines()
    assert told == f"{num_held_out} held-out questions left out"
    assert counts.startswith(f"imported {40 - num_held_out} rows into")


@pytest.mark.parametrize("kind", ["jsonl", "table"])
def test_a_file_without_rows_is_refused_and_makes_no_store(tmp_path: Path, kind: str) -> None:
    empty = write_lines(tmp_path / "empty.jsonl", [])
    failed = run("import", kind, empty, f"run.dir={tmp_path}")
    expected = f"chord-expert: {empty}: got no rows, expected at least one demonstration\n"
    assert (failed.returncode, failed.stdout, failed.stderr) == (2, "", expected)
    assert list(tmp_path.iterdir()) == [empty]


def test_mistakes_of_a_table_import_end_with_2_and_one_line(tmp_path: Path) -> None:
    place, path = f"run.dir={tmp_path}", write_lines(tmp_path / "a.jsonl", prompts(1))
    commands = {
        (place,): "SOURCE: got none, expected at least one: a .jsonl or .parquet file, a folder",
        (tmp_path / "gone.parquet", place): "gone.parquet: cannot be read (No such file or directory), expected a Parq",
        ("gone.txt", place): "gone.txt: got no such file, expected a .jsonl or .parquet file, a folder",
        (path, place, "--prompt-template", "Q"): '--prompt-template: got "Q", expected text with {question}',
        (path, place, "--split", "test"): '--split: got "test" of',
        (path, place, "--messages-column", "m", "--prompt-column", "p"): "--messages-column: got a prompt or response",
    }
    for arguments, words in commands.items():
        failed = run("import", "table", *arguments)
        assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (2, "", 1), failed
        assert words in failed.stderr


def test_imported_questions_are_distinct_right_and_apart_from_held_out_ones() -> None:
    config = resolve_config(None, CHAIN_SUM).config
    rows = [r for r in read_reasoning_gym(config, num_rows=300, response=Response.ANSWER) if isinstance(r, NewRow)]
    questions = {r.messages[-2].content for r in rows}
    problems = ReasoningProblems(**config.environment.options)
    held_out = {problem.question for problem in islice(problems.distinct("held_out"), 300)}
    assert len(rows) == len(questions) == len(held_out) == 300
    assert {split_of(question) for question in questions} == {"train"}
    assert not questions & held_out


def test_a_solution_that_its_own_environment_calls_wrong_is_a_bad_row() -> None:
    config = resolve_config(None, ["environment.options.family=knights_knaves"]).config
    answers = list(read_reasoning_gym(config, num_rows=2, response=Response.ANSWER))
    solutions = list(read_reasoning_gym(config, num_rows=2, response=Response.SOLUTION))
    assert [type(r) for r in answers + solutions] == [NewRow, NewRow, BadRow, BadRow]
    assert re.search(r"question .*: the solution .* scores 0, expected 1", solutions[0].line)  # pyright: ignore


@pytest.mark.parametrize("overrides", [[], ["environment.options.family=no_such_family"], ["environment.name=mine"]])
def test_an_environment_without_questions_is_a_configuration_error(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^environment\.(options|name): "):
        read_reasoning_gym(resolve_config(None, overrides).config, num_rows=1, response=Response.ANSWER)


def test_jsonl_is_imported_counted_listed_verified_and_exported(tmp_path: Path) -> None:
    place = f"run.dir={tmp_path / 'run'}"
    path = tmp_path / "run" / "expert.sqlite"
    first = write_lines(tmp_path / "first.jsonl", [*prompts(1200), *prompts(2), {"prompt": "μ"}])
    imported = run("import", "jsonl", first, place, "--skip-bad-rows")
    assert imported.returncode == 0
    assert imported.stdout == f"imported 1,200 rows into {path} (2 duplicates, 1 bad rows skipped)\n"
    assert f"skipped {first}:1203: got no messages" in imported.stderr

    listed = run("list", place, "--json", "--limit", 2).stdout.splitlines()
    assert [json.loads(line)["row_id"] for line in listed] == [1, 2]
    assert run("list", place, "--limit", 1).stdout.splitlines() == [
        "     1     0 uses  first.jsonl  question 0 → answer 0",
        "… 1,199 more of 1,200 rows",
    ]
    verified = run("verify", place)
    assert (verified.returncode, verified.stdout) == (0, f"{path}: 1,200 rows, nothing wrong\n")

    exported, copy = tmp_path / "exported.jsonl", tmp_path / "copy.sqlite"
    assert run("export", exported, place).stdout == f"exported 1,200 rows to {exported}\n"
    assert run("import", "jsonl", exported, f"expert.path={copy}").returncode == 0
    with closing(ExpertStore(path)) as one, closing(ExpertStore(copy)) as other:
        assert list(one.rows()) == list(other.rows())
        assert one.fingerprint() == other.fingerprint()
    assert "from first.jsonl" in run("stats", f"expert.path={copy}").stdout
    assert not list(tmp_path.glob(".*"))


def test_bad_rows_stop_an_import_with_the_first_of_them_listed(tmp_path: Path) -> None:
    path = tmp_path / "expert.sqlite"
    bad = write_lines(tmp_path / "bad.jsonl", [*prompts(3), *["{}"] * 25])
    stopped = run("import", "jsonl", bad, f"expert.path={path}")
    lines = stopped.stderr.splitlines()
    assert (stopped.returncode, stopped.stdout, len(lines)) == (2, "", 21)
    assert [line.split(" ")[1] for line in lines[:20]] == [f"{bad}:{number}:" for number in range(4, 24)]
    assert lines[20].startswith("chord-expert: 25 bad rows, nothing was imported; --skip-bad-rows")
    assert not path.exists()


def test_importing_reasoning_gym_twice_adds_nothing_and_says_where_questions_end(tmp_path: Path) -> None:
    place = [f"run.dir={tmp_path}", *FEW_QUESTIONS]
    first, second = (run("import", "reasoning_gym", "--num-rows", 500, *place) for _ in range(2))
    num_found = int(first.stdout.split("found only ")[1].split(" ")[0])
    assert 100 < num_found < 500
    assert first.stdout.splitlines() == [
        f"asked for 500 rows, found only {num_found} distinct training questions",
        f"imported {num_found} rows into {tmp_path / 'expert.sqlite'} (0 duplicates, 0 bad rows skipped)",
    ]
    assert second.stdout.splitlines()[1].endswith(f"({num_found} duplicates, 0 bad rows skipped)")
    assert (first.returncode, second.returncode) == (0, 0)


def test_verify_ends_with_1_where_content_was_changed(store: ExpertStore) -> None:
    store.add([row("needle"), row("needles")])
    store.close()
    store.path.write_bytes(store.path.read_bytes().replace(b"needle", b"noodle"))
    verified = run("verify", f"expert.path={store.path}")
    assert (verified.returncode, len(verified.stdout.splitlines()), verified.stderr) == (1, 2, "")


def test_mistakes_end_with_2_and_one_line(tmp_path: Path) -> None:
    gone, place = tmp_path / "gone.jsonl", f"run.dir={tmp_path}"
    commands = {
        ("verify", place): "expert.sqlite: got no such file, expected an expert store",
        ("list", "expert.rows_per_stp=1"): "expert.rows_per_stp: unknown key, expected expert.rows_per_step",
        ("import", "jsonl", place): "FILE: got none, expected",
        ("import", "jsonl", gone, place): "gone.jsonl: got no such file, expected",
        ("import", "jsonl", tmp_path, place): "cannot be read (Is a directory), expected",
        ("import", "reasoning_gym", "run.dir=/dev/null/run", *CHAIN_SUM): "cannot be made (Not a directory), expected",
    }
    for arguments, words in commands.items():
        failed = run(*arguments)
        assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (2, "", 1), failed
        assert words in failed.stderr


def test_a_full_disk_is_told_in_one_line_and_nothing_is_half_imported(store: ExpertStore, tmp_path: Path) -> None:
    def two_mebibytes() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))

    store.add([row("a")])
    big = write_lines(tmp_path / "big.jsonl", [{"prompt": f"{i}", "response": "x" * 10_000} for i in range(600)])
    failed = run("import", "jsonl", big, f"expert.path={store.path}", limit=two_mebibytes)
    assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (2, "", 1)
    assert re.match(rf"chord-expert: {re.escape(str(store.path))}: got .+, expected .+", failed.stderr)
    assert store.row_ids() == [1]
    assert list(store.verify()) == []


def test_check_prints_the_configuration_and_touches_nothing(tmp_path: Path) -> None:
    exported = tmp_path / "rows.jsonl"
    for command in (
        ["import", "jsonl"],
        ["import", "table"],
        ["import", "reasoning_gym"],
        ["list"],
        ["stats"],
        ["verify"],
        ["export", exported],
    ):
        checked = run(*command, "--check", f"run.dir={tmp_path / 'run'}")
        assert checked.returncode == 0
        assert re.search(r"run\.dir = .* # override", checked.stdout)
    assert run("stats", "--check", "run.seed=-1").returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_the_command_starts_without_heavy_imports() -> None:
    code = "import sys, learner.expert.__main__; print({'torch', 'transformers', 'reasoning_gym'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert loaded.stdout == "set()\n"


def test_commands_that_need_rows_say_in_one_line_that_the_store_has_none(tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_model)
    ExpertStore(tmp_path / "expert.sqlite", create=True).close()
    said = f"expert.path: {tmp_path / 'expert.sqlite'} holds no rows, expected at least one (see chord-expert import)"
    for module in ("learner", "common.local"):
        failed = run_module(module, "--config", str(config), check=False)
        assert failed.returncode == 2, failed.stderr
        assert [line for line in failed.stderr.splitlines() if said in line] == failed.stderr.splitlines()[-1:]
        assert "Traceback" not in failed.stdout + failed.stderr
