"""The typed result document of an evaluation, and access to its figures by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import Field

from medspark.config import Config
from medspark.eps import eps_name
from medspark.evaluate.bootstrap import Interval
from medspark.evaluate.metrics import ClassMetrics, FindingMetrics
from medspark.evaluate.noise_result import NoiseResult
from medspark.evaluate.sanity import Flag
from medspark.job import Result
from medspark.models.card import Decision

__all__ = [
    "CLEAN", "QUALITY", "WORST", "AttackFigures", "ConditionFigures", "EvaluationResult",
    "Figure", "RobustnessResult", "metrics_by_name",
]  # fmt: skip

CLEAN = "clean"
WORST = "worst_case"
# Fields of a condition: how near the denoised images are to the clean ones.
QUALITY = ("psnr", "ssim")


class Figure(Config):
    """One metric of one network under one condition, with its 95 % interval if it has one.

    Metrics and ``success_rate`` are in [0, 1]; ``linf_255`` and ``rms_255`` are grey levels of 255.
    """

    attack: str = Field(description="clean, the name of an attack, or worst_case")
    eps: float = Field(description="budget, a fraction of [0, 1]")
    metric: str
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def name(self) -> str:
        """The name in MLflow: clean/auroc, pgd/eps_2_255/accuracy."""
        condition = CLEAN if self.attack == CLEAN else f"{self.attack}/{eps_name(self.eps)}"
        return f"{condition}/{self.metric}"


class ConditionFigures(Result):
    """Metrics of the images under one condition; None if the labels do not define one."""

    accuracy: float | None = None
    balanced_accuracy: float | None = None
    auroc: float | None = None
    sensitivity: float | None = None
    specificity: float | None = None
    label_accuracy: float | None = Field(None, description="for findings only")
    psnr: float | None = Field(
        None, description="of the denoised images against the clean ones, in dB, at most 100"
    )
    ssim: float | None = Field(
        None, description="structural similarity of the denoised images with the clean ones"
    )
    intervals: dict[str, Interval] = Field({}, description="95 % intervals by metric")
    classes: tuple[ClassMetrics, ...] = ()

    @property
    def metrics(self) -> dict[str, float | None]:
        """The metrics that the document holds, by name."""
        names = [name for name in FindingMetrics.model_fields if name in self.model_fields_set]
        return {name: getattr(self, name) for name in names}

    def figures(self, attack: str = CLEAN, eps: float = 0.0) -> Iterator[Figure]:
        """Yield every figure that is not None, as one of ``attack`` at ``eps``."""
        for metric, value in self._values().items():
            if value is not None:
                low, high = self.intervals.get(metric, (None, None))
                yield Figure(attack=attack, eps=eps, metric=metric, value=value, low=low, high=high)

    def _values(self) -> Mapping[str, float | None]:
        return self.metrics | {name: getattr(self, name) for name in QUALITY}


class AttackFigures(ConditionFigures):
    """Metrics under one attack at one budget ``eps``, a fraction of [0, 1]."""

    name: str
    steps: int
    eps: float
    success_rate: float | None = Field(
        None, description="share of the images right when clean that are wrong under attack"
    )
    linf_255: float | None = Field(
        None, description="largest change of a pixel, mean over the images, in grey levels of 255"
    )
    rms_255: float | None = Field(
        None, description="root mean square of the change, mean over the images, in grey levels"
    )
    carried: int | None = Field(
        None,
        description="images not attacked at this eps, because the attack failed at a larger one; "
        "its perturbation, made smaller, stands for them",
    )

    def _values(self) -> Mapping[str, float | None]:
        names = ("success_rate", "linf_255", "rms_255")
        return dict(super()._values()) | {name: getattr(self, name) for name in names}


class RobustnessResult(Result):
    """Metrics clean and under attack, and the sanity flags."""

    images: int
    decision: Decision | None = Field(
        None, description="the operating point of all figures; without one, the likeliest class"
    )
    clean: ConditionFigures
    attacks: tuple[AttackFigures, ...] = ()
    worst_case: tuple[AttackFigures, ...] = Field(
        (), description="per eps: each image under the worst attack at that eps or a smaller one"
    )
    believable: bool = Field(True, description="whether no sanity check triggered")
    flags: tuple[Flag, ...] = ()

    @property
    def triggered_flags(self) -> tuple[Flag, ...]:
        """The flags that triggered: reasons not to trust these figures."""
        return tuple(flag for flag in self.flags if flag.triggered)

    @property
    def under_attack(self) -> tuple[AttackFigures, ...]:
        """The metrics by attack and budget, then the worst cases."""
        return (*self.attacks, *self.worst_case)

    def figures(self) -> tuple[Figure, ...]:
        """Return every figure: clean, then by attack and budget, then the worst cases."""
        attacked = (attack.figures(attack.name, attack.eps) for attack in self.under_attack)
        return (*self.clean.figures(), *(figure for figures in attacked for figure in figures))

    def value(self, attack: str, metric: str, *, eps: float = 0.0) -> float | None:
        """Return the value of one figure, or None if it is undefined or was not measured."""
        wanted = attack, eps, metric
        values = (f.value for f in self.figures() if (f.attack, f.eps, f.metric) == wanted)
        return next(values, None)


class EvaluationResult(RobustnessResult):
    """The result document of jobs/evaluate.py."""

    model: str
    noise: NoiseResult | None = Field(None, description="noisy weights, judged with their noise")
    dataset_digest: str
    split: str
    norm: str
    report: str = Field(description="path of the HTML report")
    gallery: int = Field(description="number of patient images in the report")
    mlflow: dict[str, Any] = Field(description="where to find the run")


def metrics_by_name(figures: Iterable[Figure], *, prefix: str = "") -> dict[str, float]:
    """Return the values of ``figures`` by their MLflow names, each with ``prefix`` before it."""
    return {prefix + figure.name: figure.value for figure in figures}
