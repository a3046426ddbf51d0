"""The configuration of an evaluation: settings for any model, and for one model and its data."""

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
from medspark.remote import AnyPath
from medspark.track.config import TrackConfig

__all__ = [
    "AttackedImages", "AttackedShards", "AttackedSplit", "EvaluationConfig", "EvaluationSettings",
    "positive_class",
]  # fmt: skip


class AttackedImages(Config):
    """How hard images are attacked, and in which pieces."""

    norm: Norm = Field("linf", description="norm that limits a perturbation")
    eps: tuple[Eps, ...] = Field(
        (1 / 255, 2 / 255, 4 / 255),
        description="budgets, fractions of [0, 1] as 2/255, separated by commas",
    )
    steps: int = Field(20, ge=1, description="steps of PGD; APGD takes five times as many")
    restarts: int = Field(1, ge=1, description="random starts of PGD")
    queries: int = Field(1000, ge=1, description="queries of the Square attack per image")
    images: int | None = Field(
        None,
        ge=1,
        description="number of images, drawn by seed as a training draws them; all by default",
    )
    piece: int = Field(64, ge=1, description="images per Spark task")
    batch_size: int = Field(64, ge=1, description="images per batch of an attack")
    seed: int = Field(
        0, ge=0, description="seed of the random starts, the resamples and the choice of images"
    )


class AttackedSplit(AttackedImages):
    """The images of a split, and how hard they are attacked."""

    split: Literal["train", "val", "test"] = Field("test", description="split to evaluate on")
    positive: str | None = Field(
        None, description="positive class for sensitivity; the last of two by default"
    )
    bootstrap: int = Field(
        1000, ge=0, description="bootstrap resamples of the patients for the confidence intervals"
    )
    sanity_images: int = Field(
        PROBED_IMAGES,
        ge=0,
        description="images that the sanity probes attack; 0 runs no probes",
    )

    def settings_of(self, attacks: tuple[AttackName, ...]) -> AttackSettings:
        """Return the settings of ``attacks`` on each piece."""
        return AttackSettings(
            attacks=attacks,
            norm=self.norm,
            eps=self.eps,
            steps=self.steps,
            restarts=self.restarts,
            queries=self.queries,
            images=self.images,
            batch_size=self.batch_size,
            seed=self.seed,
            sanity_images=self.sanity_images,
        )


class AttackedShards(AttackedSplit):
    """The images of a split of one folder of shards."""

    shards: AnyPath = Field(description="folder that jobs/shard.py wrote")


class EvaluationSettings(AttackedSplit):
    """The settings that do not depend on the model: images, attacks and the report."""

    attacks: tuple[AttackName, ...] = Field(
        ("fgsm", "pgd", "pgd_margin", "autoattack"),
        description="names of the attacks, separated by commas",
    )
    gallery: int = Field(
        6, ge=0, description="patient images shown in the report, and so in MLflow; 0 for none"
    )

    def attack_settings(self) -> AttackSettings:
        """Return the settings of the attacks on each piece."""
        return self.settings_of(self.attacks)


class EvaluationConfig(EvaluationSettings, AttackedShards):
    """One evaluation: the settings, one model, and one split of the shards."""

    model: str = Field(
        description="folder with model.safetensors, an .onnx file (black-box attacks only), or an "
        "MLflow model or run: models:/NAME/1, runs:/ID/model"
    )
    surrogates: tuple[str, ...] = Field(
        (),
        description="the attacker's models for the transfer attack, in the same form as model",
    )
    folder: Path = Field(
        Path("build/evaluations"),
        description="folder for finished pieces and the report, shared by all Spark workers",
    )
    track: TrackConfig = TrackConfig()


def positive_class(name: str | None, classes: tuple[str, ...]) -> int | None:
    """Return the index of the class ``name``, None for None. Raises UsageError if it is unknown."""
    if name is None:
        return None
    if name not in classes:
        raise UsageError(f"positive: there is no class '{name}'; there are {', '.join(classes)}.")
    return classes.index(name)
