"""The typed result document of a training."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from medspark.evaluate.result import ConditionFigures, RobustnessResult
from medspark.job import Result

__all__ = ["TrainResult", "ValidationResult"]


class ValidationResult(Result):
    """The network's metrics on validation images after one epoch."""

    epoch: int = Field(description="number of the epoch; the first is 1")
    score: float = Field(description="balanced accuracy, under PGD if robust; selects the epoch")
    clean: ConditionFigures
    pgd: ConditionFigures


class TrainResult(RobustnessResult):
    """The result document of a training: robustness on the test images, speed, and environment.

    ``startup``, ``launch`` and ``mlflow`` are present if Spark started the training; ``ingest`` if
    the job made the data first; ``baseline`` if the job ran a training without attacks first.
    """

    warning: str | None = Field(None, description="why not to trust any of the results")
    mode: str = Field(description="train.mode, or the method of distillation")
    validation: ValidationResult | None = Field(None, description="metrics of the chosen epoch")
    epochs: int
    alarms: list[dict[str, Any]] = Field([], description="alarms of the monitor, in order")
    steps: int
    model: str = Field(description="folder of the chosen network")
    architecture: str
    batch_norm: str
    precision: str
    world_size: int
    threads_per_rank: int
    global_batch: int
    images_per_second: float = Field(description="training speed, summed over all ranks")
    data_wait_share: float = Field(description="share of training time spent waiting for images")
    communication_share: float = Field(description="share of a step spent waiting for other ranks")
    peak_memory_mb: float = Field(description="peak memory in MB, the largest of all ranks")
    timeline: dict[str, float] = Field({}, description="times of rank 0, seconds since 1970")
    train_images: int
    dataset_digest: str
    startup: dict[str, float] = Field({}, description="seconds to the first step, by phase")
    launch: dict[str, Any] = Field({}, description="what Spark started, and how often")
    mlflow: dict[str, Any] = Field({}, description="where to find the run")
    ingest: dict[str, Any] | None = Field(None, description="result of the demo's ingest")
    baseline: TrainResult | None = Field(None, description="result of training without attacks")
