"""The configuration of a recalibration, and its typed result document."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from medspark.attacks.threat import ThreatModel
from medspark.config import Config
from medspark.evaluate.config import DecisionConfig
from medspark.job import Result
from medspark.models.card import Decision
from medspark.remote import AnyPath
from medspark.track.config import TrackConfig

__all__ = ["Estimate", "RecalibrateConfig", "RecalibrateResult"]


class RecalibrateConfig(Config):
    """Fit temperature and threshold of one model to a few labelled images of a site."""

    model: str = Field(
        description="folder with model.safetensors, or an MLflow model or run: models:/NAME/1, "
        "runs:/ID/model"
    )
    shards: AnyPath = Field(description="folder that jobs/shard.py wrote, with images of the site")
    split: Literal["train", "val", "test"] = Field("test", description="split to draw from")
    images: int = Field(50, ge=10, description="number of images to draw, by patients")
    seed: int = Field(0, ge=0, description="of the draw and the resamples")
    decision: DecisionConfig = Field(
        DecisionConfig(), description="by default as in the model's card, without one youden"
    )
    attack: ThreatModel = Field(ThreatModel(), description="with decision.under pgd")
    steps: int = Field(20, ge=1, description="steps of PGD, for a decision under attack")
    bootstrap: int = Field(200, ge=20, description="resamples of the patients for the intervals")
    run_dir: Path | None = Field(
        None,
        description="folder for the new model; by default a new one beside the output: x.run, "
        "x-2.run, ...",
    )
    overwrite: bool = Field(False, description="replace the run in run_dir; other files there stay")
    track: TrackConfig = TrackConfig()


class Estimate(Config):
    """A figure with its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None


class RecalibrateResult(Result):
    """The result document of jobs/recalibrate.py.

    ``sensitivity`` and ``specificity`` are cross-validated: what other images of the site can
    expect at the new threshold. ``before`` holds the old temperature and threshold, and the rates
    that the old threshold has in the sample.
    """

    temperature: Estimate
    threshold: Estimate
    sensitivity: Estimate
    specificity: Estimate
    images_needed: int = Field(description="images that would give both rates within .05")
    images_needed_for: dict[str, int] = Field(description="the same for each of the two rates")
    warning: str | None = Field(
        None, description="how site and validation images differ, if by more than chance"
    )
    decision: Decision
    before: dict[str, float | None]
    images: int
    patients: int
    class_counts: dict[str, int] = Field(description="images of each class in the sample")
    model: str = Field(description="folder of the new version of the model")
    dataset_digest: str
    split: str
    mlflow: dict[str, Any] = Field({}, description="where to find the run")
