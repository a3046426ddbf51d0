"""The typed result document of an export: each artifact with its cost and its robustness."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from medspark.config import Config
from medspark.evaluate.result import RobustnessResult
from medspark.export.packages import Backend, Precision
from medspark.job import Result

__all__ = ["Artifact", "ExportResult", "Latency", "Parity"]


class Latency(Config):
    """Milliseconds for one image."""

    median: float
    p99: float


class Parity(Config):
    """How far an exported model's answers are from its torch twin's, over all images of a split.

    Probabilities are those at temperature 1.
    """

    images: int
    largest_difference: float = Field(description="of a probability, over all images and classes")
    mean_difference: float = Field(description="of a probability, over all images and classes")
    same_answers: float = Field(description="share of images with the same prediction")


class Artifact(RobustnessResult):
    """One exported model: its cost, its parity with the twin, and its figures under attack."""

    backend: Backend
    precision: Precision
    path: str = Field(description="the model's folder")
    bytes: int = Field(description="size of the graph's files")
    numbers: str = Field(description="format of weights and activations")
    tried: tuple[str, ...] = Field((), description="the graphs that were tried, with their figures")
    layers: dict[str, float] = Field(
        {}, description="error of the logits by layer; only if no graph kept its answers at once"
    )
    latency_ms: Latency = Field(description="of one image, with one thread")
    latency_ms_2_threads: Latency
    peak_bytes: int = Field(description="largest memory of a process that predicts")
    parity: Parity


class ExportResult(Result):
    """The result document of jobs/export_edge.py."""

    model: str
    architecture: str
    dataset_digest: str
    split: str
    norm: str
    processor: str = Field(description="instructions for sums of 8-bit products; empty: none")
    twin: RobustnessResult = Field(description="the torch network under its own attacks")
    twin_latency_ms: Latency = Field(description="of the torch network, eager, with one thread")
    artifacts: tuple[Artifact, ...]
    report: str = Field(description="path of the HTML report")
    mlflow: dict[str, Any] = Field(description="where to find the run")
