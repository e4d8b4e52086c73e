"""Where the tools are that `make test-deploy` installs."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / ".tools"
