"""Compute the summary figures of a training for MLflow: speed, start-up, robustness."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import psutil

from medspark.evaluate.noise_result import NoiseResult
from medspark.evaluate.result import CLEAN, WORST, RobustnessResult, metrics_by_name
from medspark.launch.distributor import Launched
from medspark.track.journal import JournalReader
from medspark.train.result import TrainResult

__all__ = [
    "compared",
    "cost",
    "noise_metrics",
    "pruning",
    "robustness",
    "speed",
    "startup",
    "submitted_at",
]


def cost(result: TrainResult) -> dict[str, float]:
    """Return speed, memory and start-up by their MLflow metric names."""
    kept = ("images_per_second", "data_wait_share", "communication_share", "peak_memory_mb")
    found: dict[str, float] = {name: getattr(result, name) for name in kept}
    return found | {f"startup/{part}_seconds": took for part, took in result.startup.items()}


def robustness(result: RobustnessResult) -> dict[str, float]:
    """Return the figures on the test images by their MLflow metric names."""
    return metrics_by_name(result.figures(), prefix="test/")


def pruning(result: TrainResult) -> dict[str, float]:
    """Return what pruning left, and the figures with noise, by their MLflow metric names."""
    kept = ("sparsity", "multiply_adds", "multiply_adds_removed")
    found = {name: getattr(result, name) for name in kept if getattr(result, name) is not None}
    return found | noise_metrics(result.noise)


def noise_metrics(noise: NoiseResult | None) -> dict[str, float]:
    """Return the figures of noisy weights by their MLflow metric names; none without noise."""
    if noise is None:
        return {}
    masked = {} if noise.masked is None else {"masked": noise.masked}
    figures = noise.as_json() | {"gain": noise.gain} | masked
    return {f"noise/{name}": float(value) for name, value in figures.items()}


def compared(result: RobustnessResult, *, eps: float) -> dict[str, float]:
    """Return the figures that MLflow's run list shows for a network trained at ``eps``.

    They are ``clean_auroc`` and ``worst_case``, the worst-case accuracy at ``eps``.
    """
    found = {
        "clean_auroc": result.value(CLEAN, "auroc"),
        "worst_case": result.value(WORST, "accuracy", eps=eps),
    }
    return {name: value for name, value in found.items() if value is not None}


def submitted_at() -> float:
    """Return when spark-submit started, or else when this process started, in Unix seconds."""
    own = psutil.Process()
    above = own.parent()
    if above is not None and "java" in above.name():
        return float(above.create_time())
    return float(own.create_time())


def startup(moments: Mapping[str, float], launched: Launched) -> dict[str, float]:
    """Return the seconds from the launch to the end of the first step: by part, and ``total``."""
    ends = {
        "spawn": launched.ranks_at,  # Spark, torchrun, interpreters
        "join": moments["joined"],  # import of torch, process group
        "open": moments["opened"],
        "build": moments["built"],
        "first_step": moments.get("stepped", moments["trained"]),  # some resumed runs have none
    }
    begins = [launched.launched_at, *ends.values()]
    parts = {name: end - begin for (name, end), begin in zip(ends.items(), begins, strict=False)}
    return parts | {"total": sum(parts.values())}


def speed(journal: Path) -> dict[str, float]:
    """Return the 5th percentile and the median of images per second.

    A large gap between them points to a slow rank.
    """
    speeds = [
        record.metrics["images_per_second"]
        for record in JournalReader(journal).poll()
        if "images_per_second" in record.metrics
    ]
    if not speeds:
        return {}
    slow, usual = np.percentile(speeds, [5, 50])
    return {"images_per_second/p5": float(slow), "images_per_second/p50": float(usual)}
