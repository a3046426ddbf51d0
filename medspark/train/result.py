"""The typed result document of a training."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from medspark.evaluate.noise_result import NoiseResult, noise_lines
from medspark.evaluate.result import ConditionFigures, RobustnessResult
from medspark.job import Result

__all__ = ["TrainResult", "ValidationResult"]


class ValidationResult(Result):
    """The network's metrics on validation images after one epoch."""

    epoch: int = Field(description="number of the epoch; the first is 1")
    score: float = Field(description="balanced accuracy, under PGD if robust; selects the epoch")
    clean: ConditionFigures
    pgd: ConditionFigures

    @classmethod
    def of(
        cls, epoch: int, clean: ConditionFigures, pgd: ConditionFigures, *, robust: bool
    ) -> ValidationResult:
        """Return the result with its score: balanced accuracy, under PGD if ``robust``.

        Plain accuracy under attack would prefer a network that always predicts the larger class.
        AUROC would not notice that a half-trained network assigns nearly everything to one class.
        """
        score = (pgd if robust else clean).balanced_accuracy or 0.0
        return cls(epoch=epoch, score=score, clean=clean, pgd=pgd)

    def better_than(self, other: ValidationResult, *, robust: bool) -> bool:
        """Return whether this epoch has the higher score; AUROC decides between equal scores.

        Scores are equal as long as a network orders the images but gives one answer to all.
        """

        def auroc(of: ValidationResult) -> float:
            return (of.pgd if robust else of.clean).auroc or 0.0

        return (self.score, auroc(self)) > (other.score, auroc(other))

    def metrics(self) -> dict[str, float]:
        """Return every defined metric by its MLflow name, such as val/pgd/accuracy."""
        figures = {
            f"val/{condition}/{name}": value
            for condition, of in (("clean", self.clean), ("pgd", self.pgd))
            for name, value in of.metrics.items()
            if value is not None
        }
        return {"val/epoch": self.epoch, "val/score": self.score} | figures

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.3g}" for name, value in self.metrics().items())


class TrainResult(RobustnessResult):
    """The result document of a training: robustness on the test images, speed, and environment.

    ``startup``, ``launch`` and ``mlflow`` are present if Spark started the training; ``ingest`` if
    the job made the data first; ``baseline`` if the job ran a training without attacks first.
    """

    warning: str | None = Field(None, description="why not to trust any of the results")
    mode: str = Field(description="train.mode, or the method of distillation or pruning")
    sparsity: float | None = Field(
        None, description="share of zeros among the prunable weights in the saved file"
    )
    multiply_adds: int | None = Field(None, description="of a pruned network, for one image")
    multiply_adds_removed: float | None = Field(
        None, description="share of the architecture's multiply-adds that pruning removed"
    )
    noise: NoiseResult | None = Field(None, description="noisy weights, judged with their noise")
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
    seconds_per_step: float = Field(
        0.0,
        description="mean seconds of a training step, without the first ones and without pauses",
    )
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

    def more_lines(self) -> list[str]:
        """Return lines of Markdown for the report, on what its table does not show."""
        return [] if self.noise is None else ["", *noise_lines(self.noise)]

    def more_metrics(self) -> dict[str, float]:
        """Return figures of a kind of training of its own, by their MLflow names."""
        return {}
