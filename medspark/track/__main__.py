"""Publish recorded runs to MLflow later: python -m medspark.track [--uri URI] FOLDER [FOLDER ...].

The folder may come from another machine. The run goes to --uri or the default store, not to the one
named in the folder. Only files inside the folder are published.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from medspark.errors import RunError
from medspark.job import log_to_terminal
from medspark.redact import safe_text
from medspark.track.runs import TrackedRun
from medspark.track.spool import Spool, read_state
from medspark.track.store import tracking_uri


def main(argv: Sequence[str]) -> int:
    """Publish every run in the folders of ``argv``; return 0 if MLflow took all of them."""
    log_to_terminal()
    chosen = _parser().parse_args(argv)
    uri = tracking_uri(chosen.uri)
    published = [_publish(folder, uri) for folder in chosen.folders]
    return 0 if all(published) else 1


def _publish(folder: Path, uri: str) -> bool:
    try:
        recorded = read_state(folder).uri
        spool = Spool.reopen(folder, uri=uri)
        spool.check()
    except RunError as error:
        print(error, file=sys.stderr)
        return False
    print(
        f"{folder}: recorded for {safe_text(recorded)}, goes to {safe_text(uri)}", file=sys.stderr
    )
    return TrackedRun(spool).publish()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m medspark.track",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--uri",
        help="MLflow tracking URI; by default MLFLOW_TRACKING_URI, on Databricks the workspace, "
        "else a database below mlruns/",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folder of a run")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
