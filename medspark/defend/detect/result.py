"""The typed result document of a detection: no figure of a detector without the adaptive one."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from medspark.defend.detect.config import Action
from medspark.evaluate.sanity import Flag
from medspark.job import Result

__all__ = [
    "AdaptiveFigures", "Chosen", "DetectResult", "DetectorFigures", "FalsePositives",
    "Generalisation", "NotAttacked", "RankDefence", "RateFigures",
]  # fmt: skip


class CaughtFigures(Result):
    """How well attacked images are told from clean and noisy ones; None where undefined.

    AUROC and TPR count images that are right when clean and wrong under attack.
    """

    auroc: float | None
    tpr_at_fpr: dict[str, float | None] = Field(
        description="share that is caught, by false-positive rate; the threshold comes from "
        "validation images, and there is none where these are too few"
    )
    undetected_and_wrong: float = Field(
        description="share of all images that are wrong and not caught at the guard's rate"
    )


class AdaptiveFigures(CaughtFigures):
    """Figures of the worst attack for each image, over all attacks up to a budget."""

    accuracy_with_guard: float = Field(
        description="share of images that are right and not caught when clean, and that no attack "
        "makes wrong without being caught"
    )
    attacks: tuple[str, ...] = Field(min_length=1, description="the attacks, oblivious ones too")
    direct: bool = Field(description="whether some of the attacks aimed at this detector")


class NotAttacked(Result):
    """The reason why a detector has no adaptive figure of its own.

    ``upper_bound`` are its figures under the attacks on other detectors; a real attack would leave
    lower ones.
    """

    reason: str = Field(min_length=1)
    upper_bound: AdaptiveFigures | None = None


class DetectorFigures(CaughtFigures):
    """One detector on one layer under one oblivious attack, and under adaptive attacks."""

    name: str
    layer: str
    attack: str
    eps: float
    fooled: int = Field(description="images that are right when clean and wrong under attack")
    adaptive: AdaptiveFigures | NotAttacked

    @model_validator(mode="after")
    def _adaptive_includes_oblivious(self) -> DetectorFigures:
        adaptive = self.adaptive
        worst = adaptive.upper_bound if isinstance(adaptive, NotAttacked) else adaptive
        if worst is not None:
            if self.attack not in worst.attacks:
                raise ValueError(f"the adaptive figures leave out the attack {self.attack}")
            if worst.undetected_and_wrong < self.undetected_and_wrong - 1e-9:
                raise ValueError("the adaptive figures are better than the oblivious ones")
        return self


class RateFigures(Result):
    """A share of images, with its 95 % interval."""

    images: int
    rate: float | None
    interval: tuple[float, float]


class FalsePositives(RateFigures):
    """The share of clean test images that the guard flags."""

    asked: float = Field(description="the rate that the user named")
    classes: dict[str, RateFigures]
    sites: dict[str, RateFigures]


class Chosen(Result):
    """The detector that became the guard, and its AUROC on validation images."""

    name: str
    layer: str
    auroc: float = Field(description="on validation images that chose it, mean over the attacks")
    best_single: str = Field(description="the best detector and layer of a single feature")


class RankDefence(Result):
    """The defence of rank_pca under one attack: answers where an attacked image is flagged.

    All are shares of the images that the attack fools.
    """

    layer: str
    attack: str
    eps: float
    previous_class: float = Field(description="right if answered with the class at rank k")
    second_class: float = Field(description="right if answered with the second best class")
    images: int


class Generalisation(Result):
    """A detector under oblivious attacks that were left out when it was fitted.

    AUROC is that on validation images, a mean over the attacks and budgets that were left out.
    """

    name: str
    layer: str
    left_out: str = Field(description="name of an attack, or a budget")
    auroc: float
    auroc_if_learnt: float | None = Field(description="of the detector that has learnt all attacks")


class DetectResult(Result):
    """The result document of jobs/detect.py."""

    model: str
    dataset_digest: str
    norm: str
    images: int
    detectors: tuple[DetectorFigures, ...]
    chosen: Chosen
    guard: str = Field(description="folder of the guard")
    action: Action
    false_positives: FalsePositives
    accuracy: float = Field(description="of the network on clean images")
    accuracy_with_guard: float = Field(description="right and not flagged, on clean images")
    undetected_without_guard: dict[str, float] = Field(
        description="by eps: share of images that any attack makes wrong; no guard catches them"
    )
    surrogates: dict[str, dict[str, float]] = Field(
        description="rank correlation of a surrogate with its detector, clean and attacked"
    )
    rank_defence: tuple[RankDefence, ...] = ()
    generalisation: tuple[Generalisation, ...] = ()
    believable: bool
    flags: tuple[Flag, ...]
    report: str
    mlflow: dict[str, Any]

    @property
    def triggered_flags(self) -> tuple[Flag, ...]:
        """The flags that triggered: reasons not to trust these figures."""
        return tuple(flag for flag in self.flags if flag.triggered)
