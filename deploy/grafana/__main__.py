"""Writes the dashboards: `python -m deploy.grafana [FOLDER]`, with grafana-foundation-sdk installed."""

import json
import sys
from pathlib import Path

from deploy.grafana.fleet import fleet
from deploy.grafana.overview import overview

DASHBOARDS = Path(__file__).parent / "dashboards"


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DASHBOARDS
    folder.mkdir(exist_ok=True)
    for name, board in (("overview", overview()), ("fleet", fleet())):
        (folder / f"{name}.json").write_text(json.dumps(board, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
