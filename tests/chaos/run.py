"""Kill processes while they work, and check that nothing is lost: the fault matrix by row.

    python tests/chaos/run.py [--only C1,C4] [--output build/chaos.json]

Needs about half an hour on two cores. Ends with status 1 if a row fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from ingest_rows import INGEST_ROWS
from lab import Lab, Verdict
from rows import ROWS
from standalone import StandaloneCluster


def main(argv: list[str]) -> int:
    """Run the rows; return 0 if all pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows, separated by commas")
    parser.add_argument("--output", type=Path, default=Path("build/chaos.json"))
    chosen = parser.parse_args(argv)
    names = [name for name in chosen.only.split(",") if name] or [*ROWS, *INGEST_ROWS]
    if unknown := sorted(set(names) - ROWS.keys() - INGEST_ROWS.keys()):
        parser.error(f"there is no row {', '.join(unknown)}; rows: {', '.join(ROWS | INGEST_ROWS)}")
    os.environ["MEDSPARK_CHAOS"] = "1"  # what is started from here can be told from the rest
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as place:
        lab = Lab(Path(place))
        for name in names:
            verdicts += _try(name, lab)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps([asdict(v) for v in verdicts], indent=1) + "\n")
    failed = sum(bool(verdict.problems) for verdict in verdicts)
    print(f"{len(verdicts) - failed} of {len(verdicts)} passed; {chosen.output}")
    return 1 if failed else 0


def _try(name: str, lab: Lab) -> list[Verdict]:
    # Each row has its own cluster, because a row may damage it.
    verdicts = []
    home = lab.folder / f"cluster-{name}"
    home.mkdir()
    began = time.monotonic()
    try:
        with StandaloneCluster(home) as lab.cluster:
            if name in ROWS:
                lab.prepare()
            for verdict in (ROWS | INGEST_ROWS)[name](lab):
                verdicts.append(verdict)
                _show(verdict, time.monotonic() - began)
    except (AssertionError, OSError, RuntimeError, psutil.Error) as error:
        verdicts.append(Verdict(name, problems=[f"{type(error).__name__}: {error}"]))
        _show(verdicts[-1], time.monotonic() - began)
    finally:
        lab.end_jobs()
    return verdicts


def _show(verdict: Verdict, seconds: float) -> None:
    state = "FAILED" if verdict.problems else "passed"
    figures = ", ".join(f"{key} {value}" for key, value in verdict.figures.items())
    print(f"{verdict.row:28} {state}  {figures}  ({seconds:.0f} s)", flush=True)
    for problem in verdict.problems:
        print(f"    {problem}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
