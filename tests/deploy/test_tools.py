"""The tools themselves."""

import shutil
import subprocess

from tests.deploy.tools import ROOT, TOOLS


def test_shell_scripts_are_clean() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    scripts = [name for name in listed if name.endswith(".sh") or name == ".ci/run"]
    assert scripts
    checked = subprocess.run(["shellcheck", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_every_tool_is_there() -> None:
    assert shutil.which("promtool")
    assert shutil.which("systemd-analyze")
    assert (TOOLS / "python" / "bin" / "checkov").exists()
