"""What can be chosen about an evaluation: its settings for any model, and one model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from medspark.attacks.config import AttackName
from medspark.attacks.threat import Norm
from medspark.config import Config
from medspark.eps import Eps
from medspark.errors import UsageError
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.sanity import PROBED_IMAGES
from medspark.track.config import TrackConfig

__all__ = ["EvaluationConfig", "EvaluationSettings", "positive_class"]


class EvaluationSettings(Config):
    """How models are evaluated, whichever they are: images, attacks, and what the report holds."""

    split: Literal["train", "val", "test"] = Field("test", description="which images")
    attacks: tuple[AttackName, ...] = Field(
        ("fgsm", "pgd", "pgd_margin", "autoattack"),
        description="by name, separated by commas",
    )
    norm: Norm = Field("linf", description="how a perturbation is measured")
    eps: tuple[Eps, ...] = Field(
        (1 / 255, 2 / 255, 4 / 255),
        description="budgets, fractions of [0, 1] as 2/255, separated by commas",
    )
    steps: int = Field(20, ge=1, description="steps of PGD; APGD takes five times as many")
    restarts: int = Field(1, ge=1, description="random starts of PGD")
    queries: int = Field(1000, ge=1, description="answers that Square may ask for per image")
    images: int | None = Field(
        None, ge=1, description="evaluate the first so many (shards are shuffled), all by default"
    )
    positive: str | None = Field(
        None, description="class that sensitivity is about; the last of two by default"
    )
    bootstrap: int = Field(1000, ge=0, description="resamples of the patients for the intervals")
    sanity_images: int = Field(
        PROBED_IMAGES,
        ge=0,
        description="images that the sanity probes attack once more, 0 for no probes",
    )
    piece: int = Field(64, ge=1, description="images that a Spark task attacks")
    batch_size: int = Field(64, ge=1, description="images attacked together")
    gallery: int = Field(
        6, ge=0, description="images of patients shown in the report, and so in MLflow; 0 for none"
    )
    seed: int = Field(0, ge=0, description="of the random starts and the resamples")

    def attack_settings(self) -> AttackSettings:
        """Return how the images of each piece are attacked."""
        return AttackSettings(
            attacks=self.attacks,
            norm=self.norm,
            eps=self.eps,
            steps=self.steps,
            restarts=self.restarts,
            queries=self.queries,
            batch_size=self.batch_size,
            seed=self.seed,
            sanity_images=self.sanity_images,
        )


class EvaluationConfig(EvaluationSettings):
    """One evaluation: these settings for one model on one split of training shards."""

    model: str = Field(
        description="folder with model.safetensors, an .onnx file (black-box attacks only), or an "
        "MLflow model or run: models:/NAME/1, runs:/ID/model"
    )
    shards: Path = Field(description="folder that jobs/shard.py wrote")
    surrogates: tuple[str, ...] = Field(
        (), description="other models, for transfer: the attacker's own; named as model is"
    )
    folder: Path = Field(
        Path("build/evaluations"),
        description="for the pieces that are done and the report; every Spark worker sees it",
    )
    track: TrackConfig = TrackConfig()


def positive_class(name: str | None, classes: tuple[str, ...]) -> int | None:
    """Return the number of the class ``name``. Raises UsageError where there is none such."""
    if name is None:
        return None
    if name not in classes:
        raise UsageError(f"positive: there is no class '{name}'; there are {', '.join(classes)}.")
    return classes.index(name)
