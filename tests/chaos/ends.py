"""How processes of a run ended, and whether a fault explains it: a crash that nobody caused is a broken promise."""

import re
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

REFUSING = frozenset({"eio", "full_disk", "bit_flip", "truncation"})
"""Faults that a component may answer by ending with a line of its own."""
SILENCING = frozenset({"stop_left"})
"""Faults that leave a component without a sign of life for longer than it may be."""
ENDED = re.compile(r"^(\S+) ended with (?:signal (\w+)|exit code (-?\d+)): starting it again(.*)")
SILENT = re.compile(r"^(\S+) has given no sign of life ")
SAID_WHY = re.compile(
    r"^chord-local: (chord-\S+: .|\S+ ended with exit code 2 and could not write why, expected room on the disk of )"
)


@dataclass(frozen=True)
class End:
    """Of one process, while the run was under `fault`."""

    name: str
    code: int
    """Negative: the signal."""
    line: str
    """What it said last."""
    fault: str

    @property
    def complaint(self) -> str:
        """Empty where the fault explains the end."""
        if self.code == -signal.SIGKILL or (self.code == 0 and "leaving: the run is over" in self.line):
            return ""
        is_explained = self.fault in REFUSING and self.code > 0
        if is_explained and (self.name != "chord-local" or SAID_WHY.match(self.line)):
            return ""
        return f"{self.name} ended with {self.code} under {self.fault or 'no fault'}: {self.line}"


class Ends:
    """The record of one run: chord-local's output is read as it grows, the rest is noted by who saw it."""

    def __init__(self, output: Path) -> None:
        self._output, self._offset = output, 0
        self.fault = ""
        """The fault that the run is under."""
        self.found: list[End] = []
        self.silences: list[str] = []
        """Lines about components that were killed because they gave no sign of life, though nobody had stopped them."""

    def note(self, name: str, code: int, line: str) -> None:
        self.found.append(End(name, code, line, self.fault))

    def read(self) -> None:
        """What chord-local said of its components since the last call."""
        with self._output.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.decode(errors="replace").splitlines():
            if match := ENDED.match(line):
                name, by_signal, code, said = match.groups()
                self.note(name, -signal.Signals[by_signal] if by_signal else int(code), said.strip())
            elif SILENT.match(line) and self.fault not in SILENCING:
                self.silences.append(f"under {self.fault or 'no fault'}: {line}")

    @property
    def complaints(self) -> list[str]:
        return [line for end in self.found if (line := end.complaint)] + self.silences

    def tally(self) -> Counter[str]:
        """Component and code, by how often."""
        return Counter(f"{end.name} {end.code}" for end in self.found)
