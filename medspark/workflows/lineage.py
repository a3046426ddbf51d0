"""Which MLflow runs made the models that a run starts from."""

from __future__ import annotations

from pathlib import Path

from medspark.errors import RunError
from medspark.track.spool import read_state

__all__ = ["lineage"]


def lineage(**models: Path | None) -> dict[str, str]:
    """Return the tags ``medspark.from_NAME``: the id of the run that made each model folder.

    A folder that no tracked run made, or whose run MLflow has not accepted, has no tag. Followed
    from run to run, the tags lead from an exported model back to the first training.
    """
    found = {f"medspark.from_{name}": _run_of(folder) for name, folder in models.items() if folder}
    return {tag: run for tag, run in found.items() if run is not None}


def _run_of(folder: Path) -> str | None:
    try:
        return read_state(folder.resolve().parent).run_id
    except RunError:
        return None
