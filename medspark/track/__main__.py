"""Publish recorded runs to MLflow later: python -m medspark.track FOLDER [FOLDER ...]."""

from __future__ import annotations

import sys
from pathlib import Path

from medspark.errors import RunError
from medspark.track.runs import TrackedRun
from medspark.track.spool import Spool


def main(folders: list[str]) -> int:
    """Publish every run in ``folders``; return 0 if MLflow took all of them."""
    complete = True
    for folder in folders:
        try:
            complete &= TrackedRun(Spool.reopen(Path(folder))).publish()
        except RunError as error:
            print(error, file=sys.stderr)
            complete = False
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
