"""The settings of attacks: which ones, at which budgets, with how many steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from medspark.attacks.config import BLACK_BOX, OF_DENOISED, AttackName, Effort
from medspark.attacks.threat import Norm, ThreatModel
from medspark.config import Config
from medspark.eps import Eps
from medspark.errors import UsageError
from medspark.evaluate.sanity import PROBED_IMAGES, SanityConfig
from medspark.evaluate.summary import Array, Trial
from medspark.models.card import Criterion
from medspark.seeding import derive
from medspark.shards.manifest import Manifest
from medspark.shards.plan import permute

__all__ = ["AttackSettings", "DecisionConfig", "check_attacks", "through_denoiser"]


class AttackSettings(Config):
    """The attacks of an evaluation, and of the final test of a training."""

    attacks: tuple[AttackName, ...] = Field(("fgsm", "pgd"), description="names of the attacks")
    norm: Norm = Field("linf", description="norm that measures a perturbation")
    eps: tuple[Eps, ...] = Field(
        (1 / 255, 2 / 255, 4 / 255), description="budgets, fractions of [0, 1] as 2/255"
    )
    steps: int = Field(
        20, ge=1, description="steps of PGD; APGD takes five times as many, FAB 2.5 times"
    )
    restarts: int = Field(
        1, ge=1, description="random starts of PGD; only images not yet fooled are restarted"
    )
    queries: int = Field(1000, ge=1, description="most queries of Square per image")
    images: int | None = Field(
        None, ge=1, description="number of images to attack, the same in every run; default: all"
    )
    batch_size: int = Field(128, ge=1, description="images per batch")
    seed: int = Field(0, ge=0, description="of the random starts and the choice of images")
    sanity_images: int = Field(
        PROBED_IMAGES, ge=0, description="images for the sanity probes; 0: no probes"
    )
    sanity: SanityConfig = SanityConfig()

    def rows(self, total: int) -> Array:
        """Return the sorted rows of the images to attack, out of ``total``."""
        if self.images is None or self.images >= total:
            return np.arange(total)
        return np.sort(permute(np.arange(self.images), total, derive(self.seed, "test")))

    def probed_below(self, rows: Array) -> int:
        """Return the row below which the sanity probes take images, out of the attacked ``rows``.

        The probes take the first ``sanity_images`` of ``rows``, or all if there are fewer.
        """
        probed = np.sort(rows)[: self.sanity_images]
        return int(probed[-1]) + 1 if len(probed) else 0

    @property
    def effort(self) -> Effort:
        """The numbers of steps, restarts and queries."""
        return Effort(steps=self.steps, restarts=self.restarts, queries=self.queries)

    def threat(self, eps: float) -> ThreatModel:
        """Return the threat model with budget ``eps``."""
        return ThreatModel(norm=self.norm, eps=eps)

    def trials(self, own: Iterable[str] = ()) -> list[Trial]:
        """Return every attack at every budget; the attacks named ``own`` come last."""
        names = [*self.attacks, *own]
        return [Trial(name, self.effort.steps_of(name), eps) for name in names for eps in self.eps]


class DecisionConfig(Config):
    """The operating point of a model of two classes, to be chosen on validation images."""

    sensitivity: float | None = Field(
        None, gt=0, le=1, description="find at least this share of the positive images"
    )
    specificity: float | None = Field(
        None, gt=0, le=1, description="call at least this share of the other images negative"
    )
    youden: bool = Field(False, description="maximise sensitivity plus specificity")
    under: Literal["clean", "pgd"] = Field(
        "clean", description="validation images to choose on: clean, or under PGD at attack.eps"
    )
    positive: str | None = Field(None, description="the positive class; the last of two by default")

    @model_validator(mode="after")
    def _is_one_goal(self) -> DecisionConfig:
        goals = [self.sensitivity is not None, self.specificity is not None, self.youden]
        if sum(goals) > 1:
            raise ValueError("give one of sensitivity, specificity and youden")
        if not any(goals) and (self.under != "clean" or self.positive is not None):
            raise ValueError("give sensitivity, specificity or youden too")
        return self

    @property
    def criterion(self) -> Criterion | None:
        """What the threshold is chosen for; None if there is to be no decision."""
        if self.youden:
            return "youden"
        if self.sensitivity is not None:
            return "sensitivity"
        return None if self.specificity is None else "specificity"

    @property
    def target(self) -> float | None:
        """The sensitivity or specificity to reach."""
        return self.specificity if self.sensitivity is None else self.sensitivity

    def positive_of(self, classes: Sequence[str], *, multi_label: bool) -> int:
        """Return the index of the positive class of ``classes``.

        Raises UsageError if there are not two classes, or if the class is unknown.
        """
        if multi_label or len(classes) != 2:
            what = f"{len(classes)} findings" if multi_label else f"{len(classes)} classes"
            raise UsageError(f"decision: a threshold needs two classes, and there are {what}.")
        if self.positive is None:
            return 1
        if self.positive not in classes:
            raise UsageError(
                f"decision.positive: there is no class '{self.positive}'; there are "
                f"{', '.join(classes)}."
            )
        return list(classes).index(self.positive)

    def check(self, manifest: Manifest) -> None:
        """Raise UsageError if no decision can be chosen on the validation images."""
        if self.criterion is None:
            return
        self.positive_of(manifest.classes, multi_label=manifest.multi_label)
        split = manifest.splits.get("val")
        if split is None or min(split.class_counts, default=0) == 0:
            raise UsageError(
                "decision: the threshold is chosen on validation images of both classes, and these "
                "shards have none of at least one."
            )


def through_denoiser(attacks: tuple[AttackName, ...]) -> tuple[AttackName, ...]:
    """Return ``attacks`` with those that a network behind a denoiser is judged by as well.

    No attacks stay none. Attacks that follow the denoiser's gradient may fail because of it, and
    are never shown alone.
    """
    more = (name for name in OF_DENOISED if name not in attacks)
    return (*attacks, *more) if attacks else attacks


def check_attacks(
    attacks: Sequence[str], *, gradients: bool, surrogates: int, denoised: bool = False
) -> None:
    """Raise UsageError for an attack that needs gradients, surrogates or a denoiser.

    ``denoised`` states whether the model has a denoiser.
    """
    lacking = [] if denoised else [name for name in attacks if name in OF_DENOISED]
    if lacking:
        raise UsageError(
            f"attacks: {' and '.join(lacking)} can attack a model with a denoiser only, as "
            "jobs/denoise.py makes one."
        )
    if "transfer" in attacks and surrogates == 0:
        raise UsageError("attacks: transfer needs a surrogate, another model to attack.")
    blocked = [name for name in attacks if name not in BLACK_BOX]
    if not gradients and blocked:
        raise UsageError(
            f"attacks: {', '.join(blocked)} cannot run on a model without gradients; square and "
            "transfer can."
        )
