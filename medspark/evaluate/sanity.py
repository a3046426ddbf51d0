"""Sanity flags: results that you should not trust (Athalye 2018, Carlini et al. 2019).

An attack that fails because gradients are hidden does not prove robustness. Each flag compares a
measured value with a threshold that a sound evaluation does not exceed. All reports use the rules
of this module, so two reports on one network agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from pydantic import Field

from medspark.config import Config
from medspark.eps import eps_text

# The sanity probes attack this many of the report's images, the first ones by row, at the report's
# largest eps ...
PROBED_IMAGES = 256
# ... by PGD on the rescaled margin with this many steps, for any number of steps of the report.
PROBE_STEPS = 20

# An ensemble of attacks does not attack an image at a smaller budget if it held at a larger one. Of
# this many rows of a dataset, one is a control image, which it attacks at every budget.
CONTROL_EVERY = 16

# The mark of flagged networks in tables and figures, and its explanations.
SIGN = "⚠"
SIGN_MEANS = f"{SIGN}: a sanity check flagged this network; do not trust its figures under attack."
HOLLOW_MEANS = "Hollow: a sanity check flagged this network; do not trust its figures under attack."

# Flags about the predictions on clean images: if one triggers, do not trust clean figures either.
_OF_CLEAN_ANSWERS = {"same_answer_for_many", "same_class_for_all", "answers_not_repeatable"}


class SanityConfig(Config):
    """The thresholds of the sanity checks; a check triggers above its threshold."""

    zero_gradients: float = Field(0.05, description="share of images whose gradient is zero")
    fgsm_gap: float = Field(
        0.35, description="FGSM accuracy minus accuracy under PGD on the rescaled margin"
    )
    pgd_gap: float = Field(
        0.15, description="PGD accuracy minus accuracy under PGD on the rescaled margin"
    )
    black_box_gap: float = Field(
        0.01, description="accuracy under all white-box attacks minus that under a black-box one"
    )
    eps_gap: float = Field(0.02, description="rise of accuracy from one eps to a larger one")
    noise_wins: float = Field(
        0.25, description="share of right predictions that noise harms as much as the attack"
    )
    saturation: float = Field(
        0.5, description="share of right predictions with a probability of exactly one"
    )
    same_answer: float = Field(
        0.1, description="share of images with identical probabilities, to the last bit"
    )
    same_class: float = Field(
        0.99, description="share of other classes' images predicted as the most frequent prediction"
    )
    unsteady: float = Field(1e-3, description="change of an image's probability in another batch")


class Flag(Config):
    """The outcome of one check: measured value, threshold, and a sentence that explains it."""

    name: str
    triggered: bool
    value: float
    threshold: float
    sentence: str
    images: int | None = Field(None, description="number of images of the measurement")
    eps: float | None = Field(None, description="budget of the measuring attack")
    steps: int | None = Field(None, description="steps of the measuring attack")

    @property
    def of_clean_answers(self) -> bool:
        """Whether the check concerns the predictions on clean images."""
        return self.name in _OF_CLEAN_ANSWERS

    def measured_on(
        self, images: int, *, eps: float | None = None, steps: int | None = None
    ) -> Flag:
        """Return the flag with the conditions of its measurement, also in its sentence."""
        parts = [f"{images} images"]
        parts += [] if eps is None else [f"eps {eps_text(eps)}"]
        parts += [f"{steps} steps"] if steps else []
        sentence = f"{self.sentence} (measured on {', '.join(parts)})"
        on = {"sentence": sentence, "images": images, "eps": eps, "steps": steps or None}
        return self.model_copy(update=on)


def zero_gradients(share: float, limits: SanityConfig) -> Flag:
    """Flag a network whose input gradient vanishes: gradient attacks do not move the image."""
    return _flag(
        "zero_gradients", share, limits.zero_gradients,
        f"{share:.1%} of the images have an input gradient of exactly zero, so FGSM and PGD "
        "do not change them",
    )  # fmt: skip


def fgsm_above_margin(fgsm: float, margin: float, limits: SanityConfig) -> Flag:
    """Flag FGSM accuracy far above that under margin PGD, whose loss does not saturate."""
    return _flag(
        "fgsm_far_above_margin_pgd", fgsm - margin, limits.fgsm_gap,
        f"accuracy is {fgsm:.3f} under FGSM and {margin:.3f} under PGD on the margin",
    )  # fmt: skip


def pgd_above_margin(pgd: float, steps: int, margin: float, limits: SanityConfig) -> Flag:
    """Flag accuracy under PGD with ``steps`` steps far above that under margin PGD."""
    return _flag(
        "pgd_far_above_margin_pgd", pgd - margin, limits.pgd_gap,
        f"accuracy is {pgd:.3f} under PGD-{steps} on the cross-entropy and {margin:.3f} under PGD "
        "on the margin",
    )  # fmt: skip


def black_box_beats_white_box(
    name: str, white_box: float, black_box: float, limits: SanityConfig
) -> Flag:
    """Flag a network that a black-box attack fools more often than all white-box attacks."""
    return _flag(
        f"{name}_beats_white_box", white_box - black_box, limits.black_box_gap,
        f"accuracy is {white_box:.3f} under all attacks that use the network's gradients and "
        f"{black_box:.3f} under {name}, which does not",
    )  # fmt: skip


def outside(share: float) -> Flag:
    """Flag an attack whose images leave the threat model, which makes its accuracy meaningless."""
    return _flag(
        "attack_leaves_threat_model", share, 0.0,
        f"{share:.1%} of the attacked images of one attack lie outside the threat model",
    )  # fmt: skip


def not_falling(name: str, accuracy: Mapping[float, float], limits: SanityConfig) -> Flag:
    """Flag an attack under which accuracy rises with eps."""
    ordered = [accuracy[eps] for eps in sorted(accuracy)]
    rise = max((after - before for before, after in pairwise(ordered)), default=0.0)
    return _flag(
        f"{name}_not_falling_with_eps", rise, limits.eps_gap,
        f"accuracy under {name} rises by {rise:.3f} from one eps to a larger one",
    )  # fmt: skip


def noise_as_strong(attack: str, share: float, limits: SanityConfig) -> Flag:
    """Flag an attack that does no more harm than random noise of the same size.

    Harm is the fall of the true class's lead, so an attack can be stronger than noise even on
    images that it does not fool.
    """
    return _flag(
        f"noise_as_strong_as_{attack}", share, limits.noise_wins,
        f"random noise harms {share:.1%} of the right predictions at least as much as {attack}",
    )  # fmt: skip


def saturated(share: float, limits: SanityConfig) -> Flag:
    """Flag a network whose probabilities are so high that float32 rounds them to one."""
    return _flag(
        "confidence_saturated", share, limits.saturation,
        f"{share:.1%} of the right predictions have a probability of exactly 1 in float32, where "
        "the cross-entropy has no gradient",
    )  # fmt: skip


def same_answer(share: float, limits: SanityConfig) -> Flag:
    """Flag a network whose output does not depend on the image for many images."""
    return _flag(
        "same_answer_for_many", share, limits.same_answer,
        f"{share:.1%} of the images get identical probabilities: part of the network is dead, and "
        "its output does not depend on them",
    )  # fmt: skip


def same_class(share: float, limits: SanityConfig) -> Flag:
    """Flag a network that predicts one class for nearly all images: no attack changes that."""
    return _flag(
        "same_class_for_all", share, limits.same_class,
        f"{share:.1%} of the images of other classes get the most frequent prediction: the network "
        "has not learnt to distinguish the classes, so its robustness means little",
    )  # fmt: skip


def unsteady(difference: float, limits: SanityConfig) -> Flag:
    """Flag a network whose output depends on chance or on the other images of the batch."""
    return _flag(
        "answers_not_repeatable", difference, limits.unsteady,
        f"the probabilities of an image differ by {difference:.2g} in another batch: the network "
        "is random or in train mode",
    )  # fmt: skip


def _flag(name: str, value: float, threshold: float, sentence: str) -> Flag:
    return Flag(
        name=name, triggered=value > threshold, value=value, threshold=threshold, sentence=sentence
    )
