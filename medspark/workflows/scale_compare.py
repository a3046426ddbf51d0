"""Compare finished sweeps on one page: jobs/scale_at.py --compare."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from medspark import ownership
from medspark.config import first_problem
from medspark.documents import read_regular
from medspark.errors import UsageError
from medspark.study.scale_report import compare_sweeps
from medspark.study.sweep import Sweep
from medspark.track.models import fetch_artifact
from medspark.workflows.scale_grid import ScaleAtConfig

__all__ = ["compare"]


def compare(config: ScaleAtConfig) -> dict[str, Any]:
    """Write the page that compares the sweeps ``config.compare``, and return the result document.

    Raises UsageError for fewer than two sweeps, and for a name that is not a sweep.
    """
    if len(config.compare) < 2:
        raise UsageError("compare: give two sweeps or more, --compare RUN RUN.")
    sweeps = [_find_sweep(name, config) for name in config.compare]
    ownership.claim(config.place, "study")
    report = compare_sweeps(config.place / "compared", sweeps)
    return {"compared": list(config.compare), "report": str(report)}


def _find_sweep(name: str, config: ScaleAtConfig) -> Sweep:
    for path in (Path(name), Path(name) / "sweep.json", Path(name) / "report" / "sweep.json"):
        if path.is_file() and path.name == "sweep.json":
            return _read_sweep(path)
    if os.sep in name or Path(name).exists():
        raise UsageError(f"compare: {name} is not the folder of a sweep: it has no sweep.json.")
    return _read_sweep(fetch_artifact(name, "sweep.json", config.track))


def _read_sweep(path: Path) -> Sweep:
    try:
        return Sweep.model_validate_json(read_regular(path))
    except OSError as error:
        raise UsageError(f"compare: {path} cannot be read: {error.strerror}.") from None
    except ValidationError as error:
        problem = first_problem(error)
        raise UsageError(f"compare: {path} is no record of a sweep: {problem}.") from None
