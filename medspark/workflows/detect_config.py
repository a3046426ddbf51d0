"""The configuration of a detection: one model, its data, detectors, and attacks through them."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from medspark.attacks.config import AttackName
from medspark.config import Config
from medspark.defend.detect.config import Action, AdaptiveSettings, DetectorName
from medspark.eps import Eps
from medspark.evaluate.config import AttackSettings
from medspark.remote import AnyPath
from medspark.track.config import TrackConfig
from medspark.workflows.evaluate_config import AttackedImages

__all__ = ["DetectConfig", "FitConfig"]


class FitConfig(Config):
    """The images that detectors are fitted on and chosen by."""

    attacks: tuple[AttackName, ...] = Field(
        ("fgsm", "pgd", "deepfool"),
        min_length=1,
        description="attacks on the training images; detectors learn from what they fool",
    )
    eps: tuple[Eps, ...] | None = Field(
        None, description="budgets of these attacks; by default those of the test images"
    )
    reference_images: int = Field(
        500, ge=3, description="clean training images, for densities, neighbours and means"
    )
    contrast_images: int = Field(
        300, ge=10, description="other training images, clean, noisy and attacked"
    )
    left_out: bool = Field(
        False, description="also leave each attack, and each eps, out of the fit in turn"
    )
    validation_images: int = Field(
        1000, ge=40,
        description="validation images: the patients of one half choose the guard, the others' "
        "clean images set its threshold",
    )  # fmt: skip
    choosing_images: int | None = Field(
        None, ge=10,
        description="most images of the choosing half, which are attacked; by default all of them",
    )  # fmt: skip


class DetectConfig(AttackedImages):
    """Fit detectors of attacked images on one model, keep the best as its guard, attack it."""

    model: str = Field(
        description="folder with model.safetensors, or an MLflow model or run: models:/NAME/1, "
        "runs:/ID/model"
    )
    shards: AnyPath = Field(description="folder that jobs/shard.py wrote")
    detectors: tuple[DetectorName, ...] = Field(
        ("kde", "bu", "lid", "safetynet", "mahalanobis", "deep", "smoothed"),
        min_length=1,
        description="names, separated by commas; rank_pca takes a pass for each row of an image",
    )
    layers: tuple[str, ...] = Field(
        ("auto",),
        min_length=1,
        description="layers, separated by commas: penultimate, logits, or the path of a module; "
        "auto takes the last of each resolution, penultimate and logits",
    )
    attacks: tuple[AttackName, ...] = Field(
        ("fgsm", "pgd", "cw"),
        min_length=1,
        description="oblivious attacks: they know the network and not the guard",
    )
    surrogates: tuple[str, ...] = Field(
        (), description="the attacker's models for the transfer attack, in the same form as model"
    )
    eps: tuple[Eps, ...] = Field(
        (2 / 255,), min_length=1,
        description="budgets, fractions of [0, 1] as 2/255, separated by commas",
    )  # fmt: skip
    images: int | None = Field(
        500, ge=1, description="number of test images, drawn by seed as a training draws them"
    )
    queries: int = Field(500, ge=1, description="queries of the Square attack per image")
    adaptive: AdaptiveSettings = AdaptiveSettings()
    fit: FitConfig = FitConfig()
    fpr: float = Field(
        0.05, gt=0, lt=1, description="false-positive rate of the guard, on clean images"
    )
    guard: Action = Field(
        "flag", description="what the guard does with a suspicious image's label: refuse it, or "
        "flag it",
    )  # fmt: skip
    folder: Path = Field(
        Path("build/detections"),
        description="folder for finished pieces and the report, shared by all Spark workers",
    )
    guard_folder: Path | None = Field(
        None, description="folder of the guard; MODEL-guard beside the model by default"
    )
    track: TrackConfig = TrackConfig()

    def settings_of(
        self, attacks: tuple[AttackName, ...], eps: tuple[float, ...] | None = None
    ) -> AttackSettings:
        """Return the settings of the oblivious ``attacks``, without sanity probes."""
        return AttackSettings(
            attacks=attacks,
            norm=self.norm,
            eps=self.eps if eps is None else eps,
            steps=self.steps,
            restarts=self.restarts,
            queries=self.queries,
            images=self.images,
            batch_size=self.batch_size,
            seed=self.seed,
            sanity_images=0,
        )
