"""An installed root as the system's own, and in it processes with as much of their unit's sandbox as can be had without
systemd: bubblewrap makes the mounts and namespaces, and libseccomp the filter of system calls.

What is not imitated: users other than one, resource control, and the credentials' own file system and access list.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import psutil

from tests.deploy.manager import Manager
from tests.deploy.tools import ROOT
from tests.deploy.units import Unit

USER = 990
"""Inside; outside it is whoever runs the tests."""
NEEDED = ("passwd", "group", "hosts", "nsswitch.conf", "resolv.conf", "ssl", "ld.so.cache", "localtime", "alternatives")
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}


def view(root: Path) -> list[str]:
    """bwrap, with the host's programs read-only, and `root` in the places that it is meant for."""
    words = [
        "bwrap",
        "--die-with-parent",
        "--unshare-user",
        "--uid",
        str(USER),
        "--gid",
        str(USER),
        "--cap-drop",
        "ALL",
    ]
    words += ["--unshare-ipc", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib64"):
        words += ["--symlink", f"usr/{name}", f"/{name}"]
    for name in NEEDED:
        words += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    words += ["--ro-bind-try", "/sys", "/sys"]
    for path in map(os.path.realpath, (sys.base_prefix, sys.prefix, ROOT)):
        words += ["--ro-bind", path, path]
    words += ["--tmpfs", "/usr/local/bin"]
    for path in Path("/usr/local/bin").iterdir():
        words += ["--ro-bind-try", str(path.resolve()), str(path)]
    for path in (root / "usr/local/bin").iterdir():
        words += ["--symlink", os.readlink(path), f"/usr/local/bin/{path.name}"]
    return words


def run_command(root: Path, line: str, *, timeout_s: float = 120) -> str:
    """What an operator types, run by a shell that takes `root` for the system; returns what it printed."""
    folders = [
        word for name in ("etc/chord-rl", "var", "opt", "mnt") for word in ("--bind", str(root / name), f"/{name}")
    ]
    done = subprocess.run(
        [*view(root), *folders, "--chdir", str(ROOT), "sh", "-euc", line], capture_output=True, text=True,
        timeout=timeout_s, env={**ENVIRONMENT, "HOME": "/var"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\nended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


class UnitProcess:
    """One start of a service, until its end."""

    def __init__(
        self, root: Path, unit: Unit, manager: Manager, *, scratch: Path, log: IO[bytes], command: Sequence[str] = ()
    ) -> None:
        """`scratch`: an empty folder, for what systemd would keep of this start; `command`: in place of ExecStart."""
        self.unit = unit
        credentials = f"/run/credentials/{unit.name}"
        writable = [f"var/lib/{unit['StateDirectory']}", f"var/cache/{unit['CacheDirectory']}"]
        environment = {**ENVIRONMENT, **unit.environment(root)}
        environment |= {"CREDENTIALS_DIRECTORY": credentials, "NOTIFY_SOCKET": "/run/systemd/notify"}
        words = view(root)
        for source, place in {
            hand_over(unit.credentials, root, scratch / "credentials"): credentials,
            manager.path: "/run/systemd/notify",
            root / "opt": "/opt",
            root / "etc/chord-rl": "/etc/chord-rl",
            root / "var/lib/chord-rl": "/var/lib/chord-rl",
        }.items():
            words += ["--ro-bind", str(source), place]
        for name in writable:
            (root / name).mkdir(parents=True, exist_ok=True)
            words += ["--bind", str(root / name), f"/{name}"]
        with write_filter(unit, scratch / "filter").open("rb") as program:
            words += ["--chdir", unit["WorkingDirectory"], "--seccomp", str(program.fileno())]
            self._bwrap = subprocess.Popen(
                [*words, *(command or unit.command(environment))], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=environment, pass_fds=[program.fileno()],
            )  # fmt: skip

    @property
    def main(self) -> psutil.Process:
        """The component itself, below bwrap."""
        (child,) = psutil.Process(self._bwrap.pid).children()
        return child

    @property
    def is_running(self) -> bool:
        return self._bwrap.poll() is None

    def wait(self, timeout_s: float) -> int:
        """The component's exit code, which bwrap ends with as well."""
        return self._bwrap.wait(timeout_s)

    def kill(self) -> None:
        self._bwrap.kill()  # and with it all that it started
        self._bwrap.wait()


def hand_over(credentials: dict[str, str], root: Path, folder: Path) -> Path:
    """Copies that only the component can read."""
    folder.mkdir()
    for name, source in credentials.items():
        shutil.copy(root / source.lstrip("/"), folder / name)
        (folder / name).chmod(0o400)
    return folder


def write_filter(unit: Unit, path: Path) -> Path:
    """The program of the unit's SystemCallFilter and RestrictAddressFamilies."""
    allowed: set[str] = set()
    for line in unit.settings["SystemCallFilter"]:
        names = expand(line.removeprefix("~").split())
        allowed = allowed - names if line.startswith("~") else allowed | names
    script = Path(__file__).with_name("syscall_filter.py")
    command = ["/usr/bin/python3", script, path, *unit["RestrictAddressFamilies"].split()]
    subprocess.run(command, input="\n".join(sorted(allowed)), text=True, check=True)
    return path


def expand(names: Sequence[str]) -> set[str]:
    """System calls of the groups that systemd knows by these names."""
    calls: set[str] = set()
    for name in names:
        if not name.startswith("@"):
            calls.add(name)
            continue
        listed = subprocess.run(["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True)
        calls |= expand([line.strip() for line in listed.stdout.splitlines()[1:] if not line.strip().startswith("#")])
    return calls
