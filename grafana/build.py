"""Writes the dashboards as Grafana reads them: `python grafana/build.py [DIRECTORY]`, by default grafana/dashboards.

The same source gives the same bytes; a test holds the files that are kept to what this writes.
"""

import json
import sys
from pathlib import Path

from books import LEDGER, LIMITS, MONEY, PROCESS, TENANTS
from service import LATENCY, SLO, TRAFFIC, UPSTREAMS

BOARDS = (SLO, TRAFFIC, LATENCY, UPSTREAMS, MONEY, TENANTS, LIMITS, LEDGER, PROCESS)


def build(directory: Path) -> None:
    """One file a dashboard, named by its uid."""
    directory.mkdir(parents=True, exist_ok=True)
    for board in BOARDS:
        path = directory / f"{board['uid'].removeprefix('meshproxy-')}.json"
        path.write_text(json.dumps(board, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "dashboards")
