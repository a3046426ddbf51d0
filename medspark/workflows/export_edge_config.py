"""The configuration of an export: one model, its data, precisions and backends."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from medspark.eps import Eps
from medspark.export.packages import Backend, Precision
from medspark.track.config import TrackConfig
from medspark.workflows.evaluate_config import AttackedShards

__all__ = ["ExportEdgeConfig"]


class ExportEdgeConfig(AttackedShards):
    """Export one model, and compare the exports with it, clean and under attack."""

    model: str = Field(
        description="folder with model.safetensors, or an MLflow model or run: models:/NAME/1, "
        "runs:/ID/model"
    )
    precision: tuple[Precision, ...] = Field(
        ("fp32", "int8"), min_length=1, description="precisions, separated by commas"
    )
    backend: tuple[Backend, ...] = Field(
        ("onnxruntime",), min_length=1, description="backends, separated by commas"
    )
    eps: tuple[Eps, ...] = Field(
        (2 / 255,), description="budgets, fractions of [0, 1] as 2/255, separated by commas"
    )
    queries: int = Field(500, ge=1, description="queries of the Square attack per image")
    calibration_images: int = Field(
        256, ge=1, description="training images that set the ranges of an int8 model"
    )
    latency_images: int = Field(200, ge=1, description="images that are timed, one by one")
    folder: Path = Field(
        Path("build/exports"),
        description="folder for the exported models and reports, shared by all Spark workers",
    )
    track: TrackConfig = TrackConfig()
