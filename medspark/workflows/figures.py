"""Figures of a training that MLflow shows beside its metrics: speed, start-up, robustness."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from medspark.eps import eps_name
from medspark.launch.distributor import Launched
from medspark.track.journal import JournalReader

__all__ = ["cost", "robustness", "speed", "startup", "submitted_at"]


def cost(result: Mapping[str, Any]) -> dict[str, float]:
    """Return speed, memory and start-up under the names that MLflow shows."""
    kept = ("images_per_second", "data_wait_share", "communication_share", "peak_memory_mb")
    figures = {key: float(result[key]) for key in kept}
    return figures | {f"startup/{part}_seconds": took for part, took in result["startup"].items()}


def robustness(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of the test images under the names that MLflow shows."""
    figures = {f"test/clean/{key}": value for key, value in result["clean"].items()}
    for attack in [*result["attacks"], *result["worst_case"]]:
        prefix = f"test/{attack['name']}/{eps_name(attack['eps'])}"
        figures |= {f"{prefix}/{key}": value for key, value in attack.items()}
    unwanted = ("/steps", "/eps")
    return {
        key: float(value)
        for key, value in figures.items()
        if isinstance(value, int | float) and not key.endswith(unwanted)
    }


def submitted_at() -> float:
    """Return when spark-submit was started, or this process where it was not."""
    own = psutil.Process()
    above = own.parent()
    if above is not None and "java" in above.name():
        return float(above.create_time())
    return float(own.create_time())


def startup(moments: Mapping[str, float], launched: Launched) -> dict[str, float]:
    """Return the seconds from the launch to the end of the first step, in all and by part."""
    ends = {
        "spawn": launched.ranks_at,  # Spark, torchrun, interpreters
        "join": moments["joined"],  # import of torch, process group
        "open": moments["opened"],
        "build": moments["built"],
        "first_step": moments.get(
            "stepped", moments["trained"]
        ),  # none is left of some resumed runs
    }
    begins = [launched.launched_at, *ends.values()]
    parts = {name: end - begin for (name, end), begin in zip(ends.items(), begins, strict=False)}
    return parts | {"total": sum(parts.values())}


def speed(journal: Path) -> dict[str, float]:
    """Return the usual speed and the slow end of it: far apart, they betray a straggling rank."""
    speeds = [
        record.metrics["images_per_second"]
        for record in JournalReader(journal).poll()
        if "images_per_second" in record.metrics
    ]
    if not speeds:
        return {}
    slow, usual = np.percentile(speeds, [5, 50])
    return {"images_per_second/p5": float(slow), "images_per_second/p50": float(usual)}
