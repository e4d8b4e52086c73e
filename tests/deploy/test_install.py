"""install.sh as root of a machine, with --build: a root in a folder, whose Python, pip and systemd are scripts."""

import subprocess
from pathlib import Path

import pytest

from tests.deploy.tools import ROOT

VENV = "/opt/chord-rl/0.1.0"
PIP = """\
#!/bin/sh
# python -m pip ...
echo "$@" >> /var/pip
case "$*" in *{missing}*) exit 1 ;; esac
"""
PYTHON = """\
#!/bin/sh
# python3 -m venv VENV
mkdir -p "$3/bin"
ln -s {python} "$3/bin/python"
touch "$3/bin/chord-learner"
chmod a+x "$3/bin/chord-learner"
"""
NOTED = """\
#!/bin/sh
echo "$(basename "$0") $*" >> /var/commands
"""


class Machine:
    """`missing`: what pip does not find; `python`: where the Python lies that the environment is made of."""

    def __init__(
        self, root: Path, *, missing: str = "nothing", python: str = "/usr/local/share/python", scripts: str = ""
    ) -> None:
        self.root = root
        for name in ("etc", "var", "opt", "run", "usr/local/share", "usr/local/sbin"):
            (root / name).mkdir(parents=True)
        self._write("share/python", PIP.format(missing=missing))
        self._write("sbin/python3", PYTHON.format(python=python))
        for name in ("systemctl", "systemd-sysusers", "chown", *scripts.split()):
            self._write(f"sbin/{name}", NOTED)

    def _write(self, name: str, text: str) -> None:
        path = self.root / "usr/local" / name
        path.write_text(text)
        path.chmod(0o755)

    def install(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [
            "bwrap",
            "--die-with-parent",
            "--unshare-user",
            "--uid",
            "0",
            "--gid",
            "0",
            "--ro-bind",
            "/usr",
            "/usr",
        ]
        for name in ("bin", "sbin", "lib", "lib64"):
            command += ["--symlink", f"usr/{name}", f"/{name}"]
        for name in ("etc", "var", "opt", "run", "usr/local"):
            command += ["--bind", str(self.root / name), f"/{name}"]
        command += [
            "--dev",
            "/dev",
            "--proc",
            "/proc",
            "--dir",
            "/root/.pyenv/bin",
            "--ro-bind",
            str(ROOT / "deploy"),
            "/checkout/deploy",
        ]
        return subprocess.run(
            [*command, "/checkout/deploy/systemd/install.sh", *words], capture_output=True, text=True, timeout=60,
            env={"PATH": "/usr/local/sbin:/usr/bin:/bin"}, check=False,
        )  # fmt: skip

    def said(self, name: str) -> list[str]:
        """Lines of what was noted in /var."""
        path = self.root / "var" / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def extras(self) -> list[str]:
        """What was asked of the checkout, in order."""
        return [line.rpartition("[")[2].rstrip("]") for line in self.said("pip") if "/checkout/" in line]


def test_the_cpu_build_of_vllm_is_asked_for_where_there_is_no_gpu(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    done = machine.install("--build", VENV)
    assert (done.returncode, done.stderr) == (0, "")
    assert machine.extras == ["cpu,demo"]
    assert (tmp_path / "usr/local/bin/chord-report").readlink() == Path(f"{VENV}/bin/chord-report")


@pytest.mark.parametrize(("scripts", "options"), [("nvidia-smi", []), ("", ["--gpu"])])
def test_the_gpu_build_is_asked_for_where_there_is_one_or_is_said_to_be(
    tmp_path: Path, scripts: str, options: list[str]
) -> None:
    machine = Machine(tmp_path, scripts=scripts)
    assert machine.install("--build", VENV, *options).returncode == 0
    assert machine.extras == ["gpu,demo"]
    assert (tmp_path / "etc/systemd/system/chord-.service.d/gpu.conf").exists()


def test_an_environment_is_built_without_vllm_where_that_does_not_install(tmp_path: Path) -> None:
    machine = Machine(tmp_path, missing="cpu,demo")
    done = machine.install("--build", VENV)
    assert done.returncode == 0
    assert machine.extras == ["cpu,demo", "demo"]
    assert "vLLM does not install here: going on without it" in done.stdout


def test_a_python_that_the_sandbox_hides_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    machine = Machine(tmp_path, python="/root/.pyenv/bin/python3.11")
    done = machine.install("--build", VENV)
    expected = f"--build: {VENV} runs /root/.pyenv/bin/python3.11, expected a Python that the sandbox can see"
    assert (done.returncode, done.stderr) == (2, f"install.sh: {expected}, such as /usr/bin/python3\n")
    assert machine.extras == []
    done = machine.install("--program", VENV)
    assert done.stderr == f"install.sh: {expected}, such as /usr/bin/python3\n".replace("--build", "--program")


def test_systemd_is_asked_to_reload_only_where_it_runs(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert machine.install().returncode == 0
    assert "systemctl daemon-reload" not in machine.said("commands")
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    assert machine.install().returncode == 0
    assert "systemctl daemon-reload" in machine.said("commands")


def test_the_last_line_of_the_uninstallation_names_what_stays(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.install("--build", VENV)
    (tmp_path / "var/lib/chord-rl/learner/expert.sqlite").touch()
    done = machine.install("uninstall")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"removed; what is yours stays: /var/lib/chord-rl, {VENV}\n"
    (tmp_path / "var/lib/chord-rl/learner/expert.sqlite").unlink()
    assert machine.install("uninstall").stdout == "removed\n"


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_is_the_head_of_the_script(word: str) -> None:
    done = subprocess.run([ROOT / "deploy/systemd/install.sh", word], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Installs chord-rl's units")
    for name in ("uninstall", "--build VENV", "--program VENV", "--gpu", "PREFIX", "DESTDIR"):
        assert name in done.stdout
    assert "set -eu" not in done.stdout
