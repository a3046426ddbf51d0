"""The configuration of a denoiser's training. This module does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from medspark.config import Config
from medspark.defend.detect.config import Action, AdaptiveSettings
from medspark.models.card import DenoiserShape
from medspark.train.config import FitConfig

__all__ = ["DenoiseConfig", "DenoiseFit", "JudgeConfig", "TrainingAttack"]

TrainingAttack = Literal["fgsm", "pgd", "noise"]


class DenoiseConfig(Config):
    """The denoiser, the images it learns from, and the weights of its losses."""

    shape: DenoiserShape = DenoiserShape()
    attacks: tuple[TrainingAttack, ...] = Field(
        ("fgsm", "pgd", "noise"),
        min_length=1,
        description="how images are changed while training, drawn for each step: attacks on the "
        "classifier alone, or noise of the same size",
    )
    through: bool = Field(
        False,
        description="attack through the denoiser in half of the steps; without, it only meets "
        "attackers who do not know it",
    )
    guide: Literal["features", "logits"] = Field(
        "features",
        description="what the classifier has to see alike in denoised and clean images: its last "
        "feature map or its logits",
    )
    reconstruct: float = Field(
        0.1, ge=0, description="weight of the squared distance in pixels, in units of eps squared"
    )
    consistency: float = Field(
        1.0,
        ge=0,
        description="weight of the squared distance in what guide names, relative to its square",
    )
    contrast: float = Field(0.1, gt=0, description="weight of the contrastive loss")
    temperature: float = Field(0.1, gt=0, description="temperature of the contrastive loss")


class JudgeConfig(Config):
    """How the detector becomes a guard and is judged after training."""

    fpr: float = Field(0.05, gt=0, lt=1, description="false-positive rate of the guard")
    action: Action = Field(
        "flag", description="what the guard does with a suspicious image's label: refuse or flag it"
    )
    images: int = Field(256, ge=20, description="most validation images, and most test images")
    adaptive: AdaptiveSettings = AdaptiveSettings()


class DenoiseFit(FitConfig):
    """Train a denoiser and a contrastive detector for one trained classifier."""

    decides_weights: ClassVar = frozenset({"denoise"})
    decides_report: ClassVar = frozenset({"judge"})

    denoise: DenoiseConfig = DenoiseConfig()
    judge: JudgeConfig = JudgeConfig()

    @property
    def mode(self) -> str:
        """The name of what is done."""
        return "denoise"

    @property
    def attacks(self) -> bool:
        """Whether training meets attacks through the whole network."""
        return self.denoise.through

    @property
    def classifier(self) -> Path:
        """The folder of the classifier to guard."""
        return Path(str(self.model.weights))
