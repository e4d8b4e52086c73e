"""What checkov finds in a folder."""

import json
import subprocess
from pathlib import Path

from tests.deploy.tools import TOOLS


def findings(framework: str, folder: Path) -> list[str]:
    """Failed checks, as "CHECK resource: what was expected". Those with a reason to be skipped are not among them."""
    command = [TOOLS / "python" / "bin" / "checkov", "--skip-download", "--directory", folder, "--framework", framework]
    done = subprocess.run([*command, "--output", "json", "--compact", "--quiet"], capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 0, done.stderr
    return [f"{one['check_id']} {one['resource']}: {one['check_name']}" for one in report["results"]["failed_checks"]]
