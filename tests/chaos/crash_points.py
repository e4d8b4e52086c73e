"""A fault at every system call of the writers of checkpoint and ledger: a forked child each, always one call further.

`explore` runs it under the shim and returns what was found; run as a module it is the prepared parent of the trials.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.chaos.shim import Control, Kind, Shim

NAME = "crash-points"
FAULTS: dict[str, Callable[[Control, int], None]] = {
    "killed before": lambda control, skip: control.kill(skip=skip),
    "killed within": lambda control, skip: control.kill(skip=skip, is_torn=True),
    "EIO once": lambda control, skip: control.fail(errno.EIO, skip=skip, repeat=1),
    "full disk": lambda control, skip: control.fail(errno.ENOSPC, skip=skip, kinds=Kind.WRITE),
}
MOST_CALLS = 5000
"""A writer with more calls than this is one that never ends."""


@dataclass
class Findings:
    """What all trials of one fault against one writer showed."""

    writer: str
    fault: str
    num_trials: int = 0
    calls: dict[str, int] = field(default_factory=dict[str, int])
    """Faults met, by system call."""
    ends: dict[str, int] = field(default_factory=dict[str, int])
    """Trials by how the writer ended: killed, done, refused (OperatorError), error (anything else)."""
    errors: dict[str, int] = field(default_factory=dict[str, int])
    """Exceptions that were no OperatorError, and how often."""
    wrong: list[str] = field(default_factory=list[str])
    """Broken promises: call number, call, and what was found."""


class Writer(Protocol):
    """One durable writer: what it starts from, what it does and acknowledges, what must hold afterwards."""

    name: str

    def prepare(self, folder: Path) -> None: ...

    def write(self, folder: Path, say: Callable[[str], None]) -> None: ...

    def check(self, folder: Path, said: Sequence[str]) -> list[str]: ...


class CheckpointWriter:
    """A third checkpoint, which ends in the pruning of the first."""

    name = "checkpoint"

    def __init__(self, scratch: Path) -> None:
        self._template = scratch / "template"
        self._save(self._template, 5)
        self._save(self._template, 10)
        reference = scratch / "reference"
        shutil.copytree(self._template, reference)
        self._save(reference, 15)
        self._bytes = {10: _read_tree(self._template / "step-00000010"), 15: _read_tree(reference / "step-00000015")}

    def prepare(self, folder: Path) -> None:
        shutil.copytree(self._template, folder)

    def write(self, folder: Path, say: Callable[[str], None]) -> None:
        self._save(folder, 15)
        say("15")

    def check(self, folder: Path, said: Sequence[str]) -> list[str]:
        wrong = self._look(folder, {15} if said else {10, 15})
        self._save(folder, 15)  # the next start must find nothing in its way
        wrong += [f"written again: {line}" for line in self._look(folder, {15})]
        return wrong + [f"left behind: {path.name}" for path in folder.glob(".partial-*")]

    def _look(self, folder: Path, allowed: set[int]) -> list[str]:
        from learner.checkpoints import Checkpoints

        found = Checkpoints(folder, keep=2).newest_good()
        if found is None or found.step not in allowed:
            return [f"newest good checkpoint: got {found}, expected one of steps {sorted(allowed)}"]
        if _read_tree(found.path) != self._bytes[found.step]:
            return [f"{found.path.name}: its bytes are not those of an undisturbed one"]
        return []

    @staticmethod
    def _save(folder: Path, step: int) -> None:
        import torch
        from safetensors.torch import save_file

        from learner.checkpoints import Checkpoints

        checkpoints = Checkpoints(folder, keep=2)
        checkpoints.begin(step)
        partial = checkpoints.partial_path(step)
        values = torch.arange(4000, dtype=torch.float32) * step
        with checkpoints.reporting():
            (partial / "state").mkdir()
            torch.save({"module": {"a": values, "b": values[:7]}, "step": step}, partial / "state" / "model.pt")
            torch.save({"moments": [values * 2, values * 3]}, partial / "state" / "optimizer.pt")
            save_file({"a": values}, partial / "policy.safetensors")
        checkpoints.finish(step, parameters_hash="")


class LedgerWriter:
    """Two optimizer steps: leases, single and grouped commits, compositions, and the end of a batch."""

    name = "ledger"

    def __init__(self, scratch: Path) -> None:
        self._template = scratch / "template"
        self._template.mkdir(parents=True)
        ledger = _open_ledger(self._template)
        for lease in ledger.lease("a", "s0", capacity=2, serving_step=0, held=()):
            ledger.commit(lease.lease_id, _body(lease.lease_id), _sample(0))
        ledger.close()

    def prepare(self, folder: Path) -> None:
        shutil.copytree(self._template, folder)

    def write(self, folder: Path, say: Callable[[str], None]) -> None:
        from learner.ledger.history import Composition

        ledger = _open_ledger(folder)
        say("opened")
        for step in range(2):
            leases = ledger.lease("a", "s1", capacity=2, serving_step=step, held=())
            for lease in leases:
                say(f"leased {lease.lease_id}")
            for lease in leases[:1]:
                ledger.commit(lease.lease_id, _body(lease.lease_id), _sample(step))
                say(f"committed {lease.lease_id}")
            with ledger.transaction():
                for lease in leases[1:]:
                    ledger.commit(lease.lease_id, _body(lease.lease_id), _sample(step))
            for lease in leases[1:]:
                say(f"committed {lease.lease_id}")
            if ledger.history.batch(step) is None:  # where the trial before was cut off later, it is replayed
                group_ids = ledger.ready(step, waits_for_oldest=True)
                ledger.commit_batch(Composition(step, tuple(group_ids), (step,), step + 1))
                say(f"batch {step} {' '.join(map(str, group_ids))}")
            ledger.finish_batch(step, json.dumps({"step": step + 1, "run_wall_s": 1.0}))
            say(f"finished {step}")
        ledger.close()

    def check(self, folder: Path, said: Sequence[str]) -> list[str]:
        ledger = _open_ledger(folder)
        try:
            wrong = [line for words in said if (line := self._doubt(ledger, words.split()))]
            if lost := ledger.account.num_lost():
                wrong.append(f"{lost} groups are lost")
        finally:
            ledger.close()
        if not wrong:
            self.write(folder, lambda _: None)
        return wrong

    @staticmethod
    def _doubt(ledger: Any, words: list[str]) -> str:
        match words:
            case ["leased", lease_id]:
                return "" if ledger.standing(lease_id) else f"lease {lease_id} is gone"
            case ["committed", lease_id]:
                (body,) = ledger.history.bodies([int(lease_id.partition(".")[0])])
                return "" if body == _body(lease_id) else f"the body of {lease_id} is another"
            case ["batch", step, *group_ids]:
                batch = ledger.history.batch(int(step))
                is_same = batch and batch.group_ids == tuple(map(int, group_ids))
                return "" if is_same else f"batch {step}: got {batch}, expected groups {group_ids}"
            case ["finished", step]:
                num_trained = ledger.account.counts().trained
                return "" if num_trained >= 2 * (int(step) + 1) else f"step {step}: only {num_trained} groups trained"
            case _:
                return ""


def _open_ledger(folder: Path) -> Any:
    from learner.ledger.ledger import Ledger

    return Ledger(folder / "ledger.sqlite", groups_per_step=2, max_staleness=1)


def _sample(version: int) -> Any:
    from learner.ledger.ledger import Sample

    return Sample(min_version=version, num_trajectories=2, num_answer_tokens=10, reward_sum=1.0, sampling_s=0.5)


def _body(lease_id: str) -> bytes:
    return lease_id.encode() * 700  # several pages of SQLite


def _read_tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WRITERS: dict[str, Callable[[Path], Writer]] = {"checkpoint": CheckpointWriter, "ledger": LedgerWriter}


def explore(folder: Path, writer: str, fault: str, *, every: int = 1, timeout_s: float = 600) -> Findings:
    """Every trial of `fault` against `writer`, at each `every`-th system call. `folder` is taken for itself."""
    folder.mkdir(parents=True)
    shim = Shim(folder / "files", folder / "controls")
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.crash_points", str(folder), writer, fault, str(every)],
        env={**os.environ, **shim.environment(NAME), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"crash points of {writer}, {fault}: {done.stderr[-3000:]}"
    return Findings(**json.loads(done.stdout.splitlines()[-1]))


def _try_all(folder: Path, writer: Writer, fault: str, every: int) -> Findings:
    """In the prepared parent: trials until one runs to its end unharmed."""
    control = Control(folder / "controls" / NAME)
    findings = Findings(writer.name, fault)
    calls, ends, errors = Counter[str](), Counter[str](), Counter[str]()
    for number in range(0, MOST_CALLS, every):
        files = folder / "files" / str(number)
        writer.prepare(files)
        said, end = _one_trial(writer, files, lambda at=number: FAULTS[fault](control, at))
        if not control.num_struck:
            break
        findings.num_trials += 1
        call = control.struck
        calls[call] += 1
        control.clear()
        control.count_anew()
        ends[end.partition(":")[0].partition(" ")[0]] += 1
        if end.startswith("error"):
            errors[end] += 1
        try:
            wrong = writer.check(files, said)
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}", *traceback.format_exc(limit=-2).splitlines()[-4:]]
        findings.wrong += [f"call {number} ({call}, {end[:150]}; said {list(said)[-1:]}): {line}" for line in wrong]
        shutil.rmtree(files)
    else:
        findings.wrong.append(f"{writer.name}: still writing after {MOST_CALLS} calls")
    findings.calls, findings.ends, findings.errors = dict(calls), dict(ends), dict(errors)
    return findings


def _one_trial(writer: Writer, files: Path, arm: Callable[[], None]) -> tuple[list[str], str]:
    """What the child acknowledged before its end, and that end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os._exit(_write_and_tell(writer, files, arm, writing))
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        lines = pipe.read().decode().splitlines()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return lines, f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    said = [line for line in lines if not line.startswith("end ")]
    return said, next((line.removeprefix("end ") for line in lines if line.startswith("end ")), "nothing said")


def _write_and_tell(writer: Writer, files: Path, arm: Callable[[], None], pipe: int) -> int:
    from common.errors import OperatorError

    def say(line: str) -> None:
        os.write(pipe, f"{line}\n".encode())

    arm()
    try:
        writer.write(files, say)
        say("end done")
    except OperatorError as error:
        say(f"end refused: {str(error).splitlines()[0]}")
    except BaseException as error:
        say(f"end error: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160])
    return 0


def main() -> None:
    folder, kind, fault, every = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    (folder / "files").mkdir(exist_ok=True)
    writer = WRITERS[kind](folder / "scratch")
    print(json.dumps(asdict(_try_all(folder, writer, fault, every))))


if __name__ == "__main__":
    main()
