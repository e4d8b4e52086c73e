"""What install.sh puts where, and what systemd itself says of the units."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.lab import VENV, install, prepare_program, uninstall
from tests.deploy.tools import ROOT
from tests.deploy.units import UNITS

SERVICES = ["chord-learner.service", "chord-actor@0.service", "chord-eval.service"]
EXPOSURE = "20"
"""In tenths: what `systemd-analyze security` may give a unit at most."""
README = (ROOT / "deploy" / "README.md").read_text()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty root with nothing but the program in it."""
    folder = tmp_path / "root"
    prepare_program(folder)
    return folder


def with_host_units(root: Path) -> Path:
    """Beside the units those of the system that they refer to."""
    shutil.copytree("/usr/lib/systemd/system", root / "usr/lib/systemd/system", symlinks=True)
    return root


def analyze(verb: str, root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", verb, "--man=no", "--no-pager", f"--root={root}", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def tree(folder: Path) -> dict[str, tuple[int, str]]:
    """Path, mode and content of all that lies in a folder."""
    found: dict[str, tuple[int, str]] = {}
    for path in sorted(folder.rglob("*")):
        content = os.readlink(path) if path.is_symlink() else path.read_text() if path.is_file() else ""
        found[str(path.relative_to(folder))] = path.lstat().st_mode, content
    return found


def files(folder: Path) -> set[str]:
    return {name for name in tree(folder) if not (folder / name).is_dir() and not name.startswith("opt/")}


@pytest.mark.parametrize("options", [[], ["--gpu"]])
def test_systemd_has_nothing_to_say_of_the_units(root: Path, options: list[str]) -> None:
    install(root, "--program", VENV, *options)
    done = analyze("verify", with_host_units(root), "chord.target", "chord.slice", *SERVICES)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_systemd_would_say_so_where_a_value_is_bad(root: Path) -> None:
    install(root, "--program", VENV)
    unit = root / UNITS / "chord-.service.d/10-common.conf"
    unit.write_text(unit.read_text().replace("WatchdogSec=60", "WatchdogSec=soon"))
    done = analyze("verify", with_host_units(root), *SERVICES)
    assert "10-common.conf:24: Failed to parse sec value, ignoring: soon" in done.stderr


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("options", [[], ["--gpu"]])
def test_a_service_is_exposed_little(root: Path, service: str, options: list[str]) -> None:
    install(root, *options)
    done = analyze("security", root, "--offline=true", f"--threshold={EXPOSURE}", service)
    assert done.returncode == 0, done.stdout
    found = re.search(r"Overall exposure level for \S+: (\S+) OK", done.stdout)
    assert found
    without, with_gpu = re.findall(
        r"(\d\.\d)(?: for the learner)? and (\d\.\d) (?:for the others|with the GPU)", README
    )
    said = with_gpu if options else without
    assert found[1] == said["learner" not in service], "deploy/README.md says something else"


def test_installing_twice_changes_nothing(root: Path) -> None:
    install(root, "--program", VENV, "--gpu")
    once = tree(root)
    install(root, "--program", VENV, "--gpu")
    assert tree(root) == once


def test_uninstalling_leaves_nothing_of_ours(root: Path) -> None:
    install(root, "--program", VENV, "--gpu")
    subprocess.run(
        ["systemctl", f"--root={root}", "--quiet", "enable", "chord.target", *SERVICES, "chord-actor@1"], check=True
    )
    assert "etc/systemd/system/chord.target.wants/chord-actor@1.service" in files(root)
    uninstall(root)
    assert files(root) == set()
    assert not (root / "etc/chord-rl").exists()
    assert not (root / "var/lib/chord-rl").exists()
    uninstall(root)


def test_what_the_operator_changed_or_made_outlives_a_new_installation_and_the_uninstallation(root: Path) -> None:
    install(root, "--program", VENV, "--gpu")
    theirs = {
        "etc/chord-rl/run.toml": "# mine\n",
        "etc/chord-rl/learner.environment": "A=1\n",
        "etc/chord-rl/keys/learner.secret": "secret",
        "etc/systemd/system/chord-.service.d/gpu.conf": "# mine too\n",
        "var/lib/chord-rl/learner/expert.sqlite": "rows",
    }
    for name, content in theirs.items():
        (root / name).write_text(content)
    install(root, "--program", VENV, "--gpu")
    uninstall(root)
    assert files(root) == set(theirs)
    assert {name: (root / name).read_text() for name in theirs} == theirs


def test_secret_keys_are_in_a_folder_that_only_their_owner_lists(root: Path) -> None:
    install(root)
    modes = {name: tree(root)[f"etc/chord-rl/{name}"][0] & 0o777 for name in ("keys", "keys/allowed", "run.toml")}
    assert modes == {"keys": 0o711, "keys/allowed": 0o755, "run.toml": 0o644}


def test_another_prefix_is_where_commands_and_units_go(root: Path) -> None:
    install(root, "--program", VENV, PREFIX="/usr")
    unit = (root / "usr/lib/systemd/system/chord-learner.service").read_text()
    assert "ExecStart=/usr/bin/chord-learner " in unit
    assert os.readlink(root / "usr/bin/chord-learner") == f"{VENV}/bin/chord-learner"
    assert not (root / "usr/local").exists()
    uninstall(root, PREFIX="/usr")
    assert files(root) == set()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--wat"], "got --wat, expected --build VENV, --program VENV, --gpu or uninstall"),
        (["--program"], "--program: got no folder, expected one"),
        (["--program", "venv"], "--program: got venv, expected an absolute path"),
        (["--program", "/home/me/venv"], "expected a folder that the sandbox can see, such as /opt/chord-rl/0.1.0"),
        (["--program", "/opt/none"], "--program: got /opt/none, expected a virtual environment with bin/chord-learner"),
        (["--build", "venv"], "--build: got venv, expected an absolute path"),
        (["--build", "/opt/new"], "--build: got DESTDIR, expected it without: build VENV first, then give --program"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_installs_nothing(root: Path, words: list[str], line: str) -> None:
    before = tree(root)
    command = [ROOT / "deploy/systemd/install.sh", *words]
    done = subprocess.run(
        command, env={**os.environ, "DESTDIR": str(root)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("install.sh: ")
    assert done.stderr.endswith(f"{line}\n")
    assert tree(root) == before


def test_every_command_is_linked(root: Path) -> None:
    install(root, "--program", VENV)
    linked = {path.name for path in (root / "usr/local/bin").iterdir()}
    assert linked == {path.name for path in (root / VENV.lstrip("/") / "bin").iterdir()}


def test_the_script_builds_with_the_torch_that_make_builds_with() -> None:
    pins = [re.findall(r"torch==\S+", (ROOT / name).read_text()) for name in ("Makefile", "deploy/systemd/install.sh")]
    assert pins[0] == pins[1] != []


def test_a_component_has_time_to_drain_before_systemd_kills_it(root: Path) -> None:
    """Asked for more time every second, systemd waits as long as the watches allow; a drain must fit without."""
    from common.config.schema import Config
    from tests.deploy.units import Unit

    install(root)
    for service in SERVICES:
        unit = Unit(root, service)
        assert float(unit["TimeoutStopSec"]) > Config().actor.drain_s + 60
        assert float(unit["WatchdogSec"]) >= Config().run.watchdog_s
        assert unit["RestartPreventExitStatus"] == "2"
        assert (unit["Type"], unit["Restart"], unit["KillMode"]) == ("notify", "on-failure", "mixed")
