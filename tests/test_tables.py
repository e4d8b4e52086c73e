"""Tables: real files, and the real `datasets` library with a hub that cannot be reached."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from common.errors import OperatorError
from common.tables import (
    INTEGER,
    LIST,
    TEXT,
    TEXT_OR_NUMBER,
    TEXTS,
    BadTableRow,
    Kind,
    TableRow,
    read_rows,
    read_table,
    take,
    take_if_any,
)

ROWS = [{"question": "1+1?", "answer": 2}, {"question": "2+2?", "answer": 4}, {"question": "μ?", "answer": None}]
READ = """
import sys
from common.errors import OperatorError
from common.tables import read_table
try:
    for row in read_table(sys.argv[1], split=sys.argv[2]):
        print(row.where, dict(row.values))
except OperatorError as error:
    print(error)
"""
CACHE = """
import sys, datasets
datasets.load_dataset(sys.argv[1], cache_dir=sys.argv[2])
"""


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def run_offline(code: str, *arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """A process whose hub is a port where nobody listens."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(cache),
        "HF_DATASETS_CACHE": str(cache / "datasets"),
    }
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_json_lines_and_parquet_give_the_same_rows_with_their_places(tmp_path: Path) -> None:
    lines = list(read_table(str(write_lines(tmp_path / "a.jsonl", [ROWS[0], "", *ROWS[1:]]))))
    parquet = list(read_table(str(write_parquet(tmp_path / "a.parquet", ROWS))))
    assert [dict(row.values) for row in lines] == [dict(row.values) for row in parquet] == ROWS
    assert [row.where for row in lines] == [f"{tmp_path}/a.jsonl:{number}" for number in (1, 3, 4)]
    assert [row.where for row in parquet] == [f"{tmp_path}/a.parquet row {number}" for number in (1, 2, 3)]


def test_rows_are_streamed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*ROWS, "{broken"])
    rows = read_table(str(path))
    assert [next(rows).values["answer"] for _ in range(3)] == [2, 4, None]
    with pytest.raises(OperatorError, match=r"a\.jsonl:4: got \"\{broken\", expected a JSON object \(key must be"):
        next(rows)


def test_rows_of_a_parquet_file_are_numbered_through_its_batches(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "big.parquet", [{"n": n} for n in range(3000)])
    rows = list(read_table(str(path)))
    assert [row.values["n"] for row in rows] == list(range(3000))
    assert rows[-1].where == f"{path} row 3000"


def test_twenty_thousand_rows_are_read_in_a_moment(tmp_path: Path) -> None:
    rows = [{"question": f"What is {n} + {n}? " + "x" * 200, "answer": str(2 * n)} for n in range(20_000)]
    for path in (write_lines(tmp_path / "a.jsonl", rows), write_parquet(tmp_path / "a.parquet", rows)):
        started = time.process_time()
        assert sum(1 for _ in read_table(str(path))) == 20_000
        assert time.process_time() - started < 10


def test_a_reader_that_goes_on_gets_the_good_rows_around_a_bad_one(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["[1]", ROWS[0]])
    bad, good = read_rows(str(path))
    assert bad == BadTableRow(f"{path}:1: got [1], expected an object")
    assert isinstance(good, TableRow)


def test_a_folder_is_read_in_the_order_of_its_file_names(tmp_path: Path) -> None:
    for name, answer in (("b", 2), ("a", 1)):
        write_parquet(tmp_path / f"{name}.parquet", [{"answer": answer}])
    write_lines(tmp_path / "README.md", ["not a table"])
    assert [row.values["answer"] for row in read_table(str(tmp_path))] == [1, 2]


def test_a_downloaded_dataset_s_folder_gives_one_split(tmp_path: Path) -> None:
    for name, answer in (("train-00000-of-00001", 1), ("test-00000-of-00001", 2)):
        write_parquet(tmp_path / f"{name}.parquet", [{"answer": answer}])
    assert [row.values["answer"] for row in read_table(str(tmp_path))] == [1]
    assert [row.values["answer"] for row in read_table(str(tmp_path), split="test")] == [2]
    with pytest.raises(
        OperatorError, match=r"got a folder with test-\S+, train-\S+, expected .parquet files that begin"
    ):
        list(read_table(str(tmp_path), split="validation"))


def test_what_is_no_table_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "fake.parquet").write_text("this is no parquet")
    (tmp_path / "empty").mkdir()
    expected = "a .jsonl or .parquet file, a folder of .parquet files, or a dataset id owner/name[:config]"
    mistakes = {
        "notes.txt": f"got a .txt file, expected {expected}",
        "no/such/thing": f"got no such file, expected {expected}",
        "gone.jsonl": "cannot be read (No such file or directory), expected a file of JSON lines",
        "gone.parquet": "cannot be read (No such file or directory), expected a Parquet file",
        "empty": "got a folder with no .parquet files, expected .parquet files",
    }
    for name, mistake in mistakes.items():
        with pytest.raises(OperatorError) as caught:
            list(read_table(str(tmp_path / name)))
        assert str(caught.value) == f"{tmp_path / name}: {mistake}"
    with pytest.raises(OperatorError, match=r"fake\.parquet: cannot be read \(Parquet magic .*\), expected a Parquet"):
        list(read_table(str(tmp_path / "fake.parquet")))


def test_a_dataset_that_cannot_be_fetched_is_told_quickly_in_one_line(tmp_path: Path) -> None:
    started = time.monotonic()
    done = run_offline(READ, "nobody/nothing:main", "test", cache=tmp_path)
    assert done.stdout.startswith(
        "nobody/nothing:main[test]: cannot be fetched (not cached, and the hub cannot be reached: "
    )
    assert done.stdout.endswith(
        "expected a .jsonl or .parquet file, a folder of .parquet files, or a dataset id owner/name[:config]\n"
    )
    assert (done.stdout.count("\n"), done.returncode) == (1, 0)
    assert all(line.startswith("waiting ") for line in done.stderr.splitlines()), done.stderr
    assert time.monotonic() - started < 120


def test_a_cached_dataset_is_read_without_the_hub(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    write_lines(tmp_path / "toy" / "train.jsonl", ROWS[:2])
    made = run_offline(CACHE, str(tmp_path / "toy"), str(tmp_path / "datasets"), cache=tmp_path)
    assert made.returncode == 0, made.stderr
    (tmp_path / "datasets" / "toy").rename(tmp_path / "datasets" / "owner___toy")  # as fetching owner/toy leaves it
    done = run_offline(READ, "owner/toy", "train", cache=tmp_path)
    places = [f"owner/toy[train] row {number}" for number in (1, 2)]
    lines = [f"{place} {row}" for place, row in zip(places, ROWS[:2], strict=True)]
    assert done.stdout.splitlines() == lines, done.stderr
    wrong_split = run_offline(READ, "owner/toy", "test", cache=tmp_path)
    assert wrong_split.stdout.startswith('owner/toy[test]: cannot be fetched (Unknown split "test". Should be one of [')
    assert wrong_split.stdout.count("\n") == 1


def test_the_first_column_with_a_value_is_taken() -> None:
    row = TableRow("a.jsonl:1", {"problem": None, "question": "1+1?", "Problem": "other"})
    assert take(row, ("problem", "question", "Problem"), TEXT) == "1+1?"
    assert take_if_any(row, ("problem", "answer"), TEXT) is None


def test_a_row_without_the_column_says_what_it_has_and_by_what_to_name_another() -> None:
    row = TableRow("a.jsonl:1", {"text": "x", "id": 3})
    with pytest.raises(OperatorError) as caught:
        take(row, ("problem", "question"), TEXT, name="environment.options.question_column")
    assert str(caught.value) == (
        'a.jsonl:1: got columns text, id, expected a value of "problem" or "question"'
        " (environment.options.question_column names another)"
    )
    with pytest.raises(OperatorError, match=r'^a\.jsonl:1: got columns text, id, expected a value of "answer"$'):
        take(row, ("answer",), TEXT)


@pytest.mark.parametrize(
    ("kind", "value", "taken"),
    [
        (TEXT, "x", "x"),
        (INTEGER, 0, 0),
        (TEXT_OR_NUMBER, 3, "3"),
        (TEXT_OR_NUMBER, 0.5, "0.5"),
        (TEXT_OR_NUMBER, Decimal("72.50"), "72.50"),
        (TEXT_OR_NUMBER, Decimal("1E+2"), "100"),
        (TEXT_OR_NUMBER, 10**400, str(10**400)),
        (TEXTS, ["a", 1], ["a", "1"]),
        (LIST, [], []),
    ],
)
def test_a_value_is_read_as_its_kind(kind: Kind[Any], value: object, taken: object) -> None:
    assert take(TableRow("here", {"column": value}), ["column"], kind) == taken


@pytest.mark.parametrize(
    ("kind", "value", "mistake"),
    [
        (TEXT, 3, "got 3, expected text"),
        (TEXT, "  ", 'got "  ", expected text'),
        (INTEGER, True, "got true, expected an integer"),
        (INTEGER, "3", 'got "3", expected an integer'),
        (TEXT_OR_NUMBER, False, "got false, expected text or a number"),
        (TEXT_OR_NUMBER, float("nan"), "got NaN, expected text or a number"),
        (TEXT_OR_NUMBER, float("inf"), "got Infinity, expected text or a number"),
        (TEXTS, ["a", float("nan")], 'got ["a", NaN], expected a list of texts'),
        (TEXTS, [], "got [], expected a list of texts"),
        (TEXTS, ["a", None], 'got ["a", null], expected a list of texts'),
        (LIST, {}, "got {}, expected a list"),
    ],
)
def test_a_value_of_another_kind_is_told_with_its_place(kind: Kind[Any], value: object, mistake: str) -> None:
    with pytest.raises(OperatorError) as caught:
        take(TableRow("a.jsonl:7", {"column": value}), ["column"], kind)
    assert str(caught.value) == f"a.jsonl:7: column: {mistake}"


def test_nothing_heavy_is_imported_for_json_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    code = READ + "\nprint({'datasets', 'pyarrow', 'huggingface_hub'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, str(path), "train"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
