"""A kill, an I/O error or a full disk at each system call of the checkpoint and ledger writers breaks no promise."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.crash_points import FAULTS, WRITERS, explore
from tests.chaos.scratch import scratch_folder


@pytest.fixture
def scratch() -> Iterator[Path]:
    with scratch_folder() as folder:
        yield folder


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_acknowledged_is_lost_and_nothing_half_written_is_used(fault: str, writer: str, scratch: Path) -> None:
    findings = explore(scratch / "trials", writer, fault)
    assert findings.wrong == []
    assert findings.num_trials >= 5
    assert findings.calls.keys() & {"write", "pwrite64"}
    if fault.startswith("killed"):
        assert findings.ends == {"killed": findings.num_trials}
        assert findings.calls.keys() & {"fsync", "fdatasync"}


@pytest.mark.parametrize(
    ("writer", "fault"),
    [
        ("ledger", "EIO once"),
        ("ledger", "full disk"),
        ("checkpoint", "full disk"),
        ("checkpoint", "EIO once"),
    ],
)
def test_a_disk_that_refuses_is_one_line_for_the_operator(writer: str, fault: str, scratch: Path) -> None:
    findings = explore(scratch / "trials", writer, fault, every=3)
    assert findings.errors == {}
    assert findings.ends.get("refused")
