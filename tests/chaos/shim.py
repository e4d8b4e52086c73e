"""The shim: faults of disk and clock for living processes, through a small preloaded library and control files."""

import errno
import hashlib
import mmap
import os
import struct
import subprocess
from enum import IntEnum, IntFlag
from pathlib import Path

SOURCE = Path(__file__).with_name("faults.c")
BUILD = SOURCE.parents[2] / "build" / "chaos"
LAYOUT = struct.Struct("=qqqqqiii20s")
"""Of a control file, as in faults.c."""


class Action(IntEnum):
    """What befalls a call."""

    PASS = 0
    FAIL = 1
    KILL = 2
    """SIGKILL before the call."""
    TEAR = 3
    """SIGKILL after half of a write, in whole sectors of 512 bytes, or after the whole of another call."""


class Kind(IntFlag):
    """Calls that change files."""

    WRITE = 1
    SYNC = 2
    NAME = 4
    """Create, rename, truncate, delete."""
    ALL = 7


class Control:
    """The faults of one process, or of the successive processes of one name."""

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            file.truncate(mmap.PAGESIZE)
            self._memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)

    def fail(self, error: int, *, skip: int = 0, repeat: int = -1, kinds: Kind = Kind.ALL) -> None:
        """Calls end with this errno: after `skip` good ones, `repeat` times (negative: until cleared)."""
        self._set(Action.FAIL, skip=skip, repeat=repeat, error=error, kinds=kinds)

    def fill_disk(self) -> None:
        """No write finds room until `clear`."""
        self.fail(errno.ENOSPC, kinds=Kind.WRITE)

    def kill(self, *, skip: int, is_torn: bool = False, kinds: Kind = Kind.ALL) -> None:
        """SIGKILL at the call after `skip` others; where torn, in its midst."""
        self._set(Action.TEAR if is_torn else Action.KILL, skip=skip, repeat=1, error=0, kinds=kinds)

    def clear(self) -> None:
        """No further fault of the disk; the clock stays as it is."""
        self._set(Action.PASS, skip=0, repeat=0, error=0, kinds=Kind.ALL)

    def shift_clock(self, by_s: float) -> None:
        """The wall clock differs by this much from now on; 0 sets it right."""
        struct.pack_into("=q", self._memory, 32, int(by_s * 1e9))

    @property
    def num_calls(self) -> int:
        """Intercepted calls of the chosen kinds since the file was made or `count_anew`."""
        return self._get()[0]

    @property
    def num_struck(self) -> int:
        """Calls that met a fault."""
        return self._get()[1]

    @property
    def struck(self) -> str:
        """Name of the call that met the last fault."""
        return self._get()[8].rstrip(b"\0").decode()

    def count_anew(self) -> None:
        struct.pack_into("=qq", self._memory, 0, 0, 0)

    def _set(self, action: Action, *, skip: int, repeat: int, error: int, kinds: Kind) -> None:
        struct.pack_into("=i", self._memory, 40, Action.PASS)  # nothing strikes while the rest is half set
        struct.pack_into("=qq", self._memory, 16, skip, repeat)
        struct.pack_into("=ii", self._memory, 44, error, kinds)
        struct.pack_into("=i", self._memory, 40, action)

    def _get(self) -> tuple[int, int, int, int, int, int, int, int, bytes]:
        return LAYOUT.unpack_from(self._memory)  # pyright: ignore[reportReturnType]


class Shim:
    """One folder under faults; processes that are started with `environment` obey the controls."""

    def __init__(self, root: Path, controls: Path) -> None:
        self._root = root.resolve()
        self._controls = controls.resolve()
        self._controls.mkdir(parents=True, exist_ok=True)

    def environment(self, name: str = "") -> dict[str, str]:
        """For a new process; without a name it takes its `--name`, or else the module that it runs."""
        found = {
            "LD_PRELOAD": str(build_library()), "CHAOS_ROOT": str(self._root), "CHAOS_CONTROLS": str(self._controls),
        }  # fmt: skip
        return found | ({"CHAOS_NAME": name} if name else {})

    def control(self, name: str) -> Control:
        return Control(self._controls / name)


def build_library() -> Path:
    """The compiled library; built at first use and whenever its source has changed."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    library = BUILD / f"faults-{digest}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = BUILD / f"faults-{digest}.{os.getpid()}.partial"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-o", str(partial), str(SOURCE), "-ldl"], check=True
        )
        partial.replace(library)
    return library
