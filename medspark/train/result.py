"""What a training comes to, as a typed result document."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from medspark.evaluate.result import ConditionFigures, RobustnessResult
from medspark.job import Result

__all__ = ["TrainResult", "ValidationResult"]


class ValidationResult(Result):
    """What the network was worth on validation images after one epoch."""

    epoch: int = Field(description="the first is 1")
    score: float = Field(description="what checkpoints are chosen by")
    clean: ConditionFigures
    pgd: ConditionFigures


class TrainResult(RobustnessResult):
    """The result document of a training: robustness on the test images, speed, and where it ran.

    ``startup``, ``launch`` and ``mlflow`` are there where Spark started it; ``ingest`` where its
    data were made first; ``baseline`` where a training without attacks went before.
    """

    warning: str | None = Field(None, description="why its figures are not to be trusted at all")
    mode: str = Field(description="train.mode, or the method of distillation")
    validation: ValidationResult | None = Field(None, description="of the epoch that was chosen")
    epochs: int
    alarms: list[dict[str, Any]] = Field([], description="of the monitor, in order")
    steps: int
    model: str = Field(description="folder of the chosen network")
    architecture: str
    batch_norm: str
    precision: str
    world_size: int
    threads_per_rank: int
    global_batch: int
    images_per_second: float = Field(description="of all ranks together")
    data_wait_share: float = Field(description="share of the time that waited for images")
    communication_share: float = Field(description="share of a step that waited for other ranks")
    peak_memory_mb: float = Field(description="of the largest rank, in MB")
    timeline: dict[str, float] = Field({}, description="moments of rank 0, seconds since 1970")
    train_images: int
    dataset_digest: str
    startup: dict[str, float] = Field({}, description="seconds to the first step, by part")
    launch: dict[str, Any] = Field({}, description="what Spark started, and how often")
    mlflow: dict[str, Any] = Field({}, description="where the run is found")
    ingest: dict[str, Any] | None = Field(None, description="result of the demo's ingest")
    baseline: TrainResult | None = Field(None, description="of the training without attacks")
