"""What a component writes to stderr: plain lines, JSON objects, and the journal's priorities."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.log_lines import LOG_FORMAT

SPEAKER = """
import logging, sys, threading, warnings
from common.command import run_command, start_logging
from common.errors import ComponentFailure
start_logging("actors.lab-0")
log = logging.getLogger("actors")
log.info("a peer said %r and\\nthis", "µ")
log.warning("slow")
log.debug("not worth a line")
warnings.warn("old")
def fail():
    raise ComponentFailure("the learner is gone")
if sys.argv[1:]:
    1 / 0
run_command("chord-actor", fail)
"""


def say(*arguments: str, **environment: str) -> tuple[int, list[str]]:
    command = [sys.executable, "-c", SPEAKER, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}, check=False
    )
    return done.returncode, done.stderr.splitlines()


def test_every_line_is_one_json_object_where_the_environment_asks_for_it() -> None:
    code, lines = say(**{LOG_FORMAT: "json"})
    said = [json.loads(line) for line in lines]
    assert [(line["level"], line["component"], line["message"]) for line in said] == [
        ("info", "actors.lab-0", "a peer said 'µ' and\nthis"),
        ("warning", "actors.lab-0", "slow"),
        ("warning", "actors.lab-0", "<string>:10: UserWarning: old\n"),
        ("critical", "chord-actor", "the learner is gone"),
    ]
    assert code == 1
    assert all(
        line["time"].endswith("+00:00") and set(line) <= {"time", "level", "component", "message"} for line in said
    )


def test_an_error_that_nothing_caught_is_one_json_object_too() -> None:
    code, lines = say("crash", **{LOG_FORMAT: "json"})
    last = json.loads(lines[-1])
    assert (code, last["level"], last["message"]) == (1, "critical", "ended by ZeroDivisionError: division by zero")
    assert last["traceback"].startswith("Traceback (most recent call last):\n")


def test_a_line_without_the_wish_is_plain_and_stays_one_line() -> None:
    _, lines = say()
    assert lines[0].endswith(" actors.lab-0 INFO a peer said 'µ' and\\nthis")
    assert lines[-1] == "chord-actor: the learner is gone"


@pytest.mark.parametrize("form", ["plain", "json"])
def test_the_journal_is_told_the_priority_of_each_line(form: str, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with journal.open("wb") as stream:
        found = os.fstat(stream.fileno())
        environment = {LOG_FORMAT: form, "JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
        subprocess.run(
            [sys.executable, "-c", SPEAKER], stderr=stream, env={**os.environ, **environment}, timeout=60, check=False
        )
    lines = journal.read_text().splitlines()
    assert [line[:3] for line in lines if line.startswith("<")][:2] == ["<6>", "<4>"]
    assert lines[-1].startswith("<2>")


def test_stderr_that_leads_elsewhere_has_no_priorities() -> None:
    _, lines = say(JOURNAL_STREAM="1:2")
    assert not [line for line in lines if line.startswith("<6>")]


def test_an_unknown_shape_is_refused_in_one_line() -> None:
    script = "from common.command import *; run_command('chord-actor', lambda: start_logging('actor-0'))"
    environment = {**os.environ, LOG_FORMAT: "xml"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "chord-actor: CHORD_LOG_FORMAT: got 'xml', expected plain or json\n")
