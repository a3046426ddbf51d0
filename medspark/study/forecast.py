"""Forecast speeds from the measurements of a sweep: step models, and predictions to check them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

from medspark.study.laws import Cluster, StepModel, fit_amdahl
from medspark.study.sweep import Curve, Prediction, Probe, median

__all__ = ["predictions", "step_models"]


def step_models(
    curves: Sequence[Curve],
    probe: Probe,
    *,
    gradient_bytes: Mapping[str, float],
    image_bytes: float,
) -> dict[str, StepModel]:
    """Return the step model of every network and mode, from single-process speeds and the probe.

    With two batch sizes, the fixed time per step is separated from the time per image.
    ``gradient_bytes`` holds, by network, the bytes that a process sends per step.
    """
    found = {}
    for curve in curves:
        within = median(curve.speeds.get(1, []))
        speeds = curve.alone or ({1: within} if within is not None else {})
        if speeds:
            per_image, per_step = _compute(speeds)
            found[f"{curve.model} {curve.mode}"] = StepModel(
                seconds_per_image=per_image,
                seconds_per_step=per_step,
                gradient_bytes=gradient_bytes[curve.model],
                loader_images_per_second=probe.loader_images_per_second,
                image_bytes=image_bytes,
            )
    return found


def _compute(speeds: Mapping[int, float]) -> tuple[float, float]:
    """Return seconds per image and seconds per step from images per second by batch."""
    least, most = min(speeds), max(speeds)
    seconds = {batch: batch / speed for batch, speed in speeds.items()}
    per_image = (seconds[most] - seconds[least]) / (most - least) if most > least else 0.0
    # Noise must make neither the time per image nor the time per step negative.
    if not 0 < per_image <= 1 / speeds[most]:
        return 1 / speeds[most], 0.0
    return per_image, seconds[most] - most * per_image


def predictions(
    curves: Sequence[Curve],
    models: Mapping[str, StepModel],
    probe: Probe,
    *,
    batch_size: int,
) -> list[Prediction]:
    """Return speeds predicted from smaller scales, with the measured speeds.

    ``batch_size`` is the global batch of one process. Points with more threads than cores are left
    out. With at least three process counts, Amdahl's law, fitted to the others, also predicts the
    largest.
    """
    here = Cluster(bandwidth=probe.bandwidth, latency=probe.latency, storage=math.inf)
    found: list[Prediction] = []
    for curve in curves:
        model = models.get(f"{curve.model} {curve.mode}")
        honest = {n: v for n, v in curve.speeds.items() if n not in curve.oversubscribed}
        for processes in honest if model is not None else ():
            if processes > 1 and model is not None:
                batch = batch_size / (1 if curve.scaling == "weak" else processes)
                speed = model.speed(processes, batch, here)
                how = "step model from one process and the timed all-reduce"
                found.append(_prediction(curve, processes, speed, how))
        found += _left_out(curve, honest)
    return found


def _left_out(curve: Curve, honest: Mapping[int, Sequence[float]]) -> Iterator[Prediction]:
    if len(honest) < 3:
        return
    largest = max(honest)
    law = fit_amdahl({n: v for n, v in honest.items() if n != largest})
    if law is not None:
        how = "Amdahl's law fitted to the smaller counts"
        yield _prediction(curve, largest, float(law.speed(largest)), how)


def _prediction(curve: Curve, processes: int, speed: float, how: str) -> Prediction:
    return Prediction(
        model=curve.model,
        mode=curve.mode,
        scaling=curve.scaling,
        world_size=processes,
        predicted=speed,
        measured=statistics.median(curve.speeds[processes]),
        how=how,
    )
