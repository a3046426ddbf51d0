"""Sanity flags: results that you should not trust (Athalye 2018, Carlini et al. 2019).

An attack that fails proves nothing if it failed because gradients were hidden from it. Each
flag compares two figures that an honest evaluation keeps in order. Every report decides its flags
by the rule that is declared here, so that two reports on one network agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from pydantic import Field

from medspark.config import Config
from medspark.eps import eps_text

# The sanity probes attack the first so many of the images that a report attacks, in the order of
# their rows, at its largest eps ...
PROBED_IMAGES = 256
# ... by PGD on the rescaled margin of so many steps, however many the report's own PGD takes.
PROBE_STEPS = 20

# How tables and figures show a network whose report has a flag, and what they say of it.
SIGN = "⚠"
SIGN_MEANS = f"{SIGN}: a sanity check flagged this network; do not trust its figures under attack."
HOLLOW_MEANS = "Hollow: a sanity check flagged this network; do not trust its figures under attack."

# Flags about the answers on clean images, so that not even the clean figures can be trusted.
_OF_CLEAN_ANSWERS = {"same_answer_for_many", "same_class_for_all", "answers_not_repeatable"}


class SanityConfig(Config):
    """The thresholds above which a check triggers."""

    zero_gradients: float = Field(0.05, description="share of images without any gradient")
    fgsm_gap: float = Field(
        0.35, description="FGSM accuracy above that of PGD on the rescaled margin"
    )
    pgd_gap: float = Field(
        0.15, description="PGD accuracy above that of PGD on the rescaled margin"
    )
    black_box_gap: float = Field(
        0.01, description="accuracy under all white-box attacks above that under a black-box one"
    )
    eps_gap: float = Field(0.02, description="rise of accuracy from one eps to a larger one")
    noise_wins: float = Field(
        0.25, description="share of right answers that random noise harms as much as the attack"
    )
    saturation: float = Field(
        0.5, description="share of correct answers with a probability of exactly one"
    )
    same_answer: float = Field(
        0.1, description="share of images that get one and the same answer, to the last bit"
    )
    same_class: float = Field(
        0.99, description="share of the other classes' images that are given the commonest answer"
    )
    unsteady: float = Field(
        1e-3, description="difference in probability when an image comes in another batch"
    )


class Flag(Config):
    """One check: whether it triggered, the figure, its threshold, and what that means."""

    name: str
    triggered: bool
    value: float
    threshold: float
    sentence: str
    images: int | None = Field(None, description="how many images it was measured on")
    eps: float | None = Field(None, description="budget of the attack it was measured with")
    steps: int | None = Field(None, description="steps of that attack")

    @property
    def of_clean_answers(self) -> bool:
        """Whether it says that not even the figures on clean images can be trusted."""
        return self.name in _OF_CLEAN_ANSWERS

    def measured_on(
        self, images: int, *, eps: float | None = None, steps: int | None = None
    ) -> Flag:
        """Return the flag with what it was measured on, which its sentence says too."""
        parts = [f"{images} images"]
        parts += [] if eps is None else [f"eps {eps_text(eps)}"]
        parts += [f"{steps} steps"] if steps else []
        sentence = f"{self.sentence} (measured on {', '.join(parts)})"
        on = {"sentence": sentence, "images": images, "eps": eps, "steps": steps or None}
        return self.model_copy(update=on)


def zero_gradients(share: float, limits: SanityConfig) -> Flag:
    """Flag a network whose input gradient vanishes: attacks by gradient cannot even start."""
    return _flag(
        "zero_gradients", share, limits.zero_gradients,
        f"{share:.1%} of the images have an input gradient of exactly zero, so FGSM and PGD "
        "leave them as they are",
    )  # fmt: skip


def fgsm_above_margin(fgsm: float, margin: float, limits: SanityConfig) -> Flag:
    """Flag FGSM figures that an attack which does not saturate contradicts."""
    return _flag(
        "fgsm_far_above_margin_pgd", fgsm - margin, limits.fgsm_gap,
        f"accuracy is {fgsm:.3f} under FGSM and {margin:.3f} under PGD on the margin",
    )  # fmt: skip


def pgd_above_margin(pgd: float, steps: int, margin: float, limits: SanityConfig) -> Flag:
    """Flag the figures of PGD of ``steps`` that the same attack on another loss contradicts."""
    return _flag(
        "pgd_far_above_margin_pgd", pgd - margin, limits.pgd_gap,
        f"accuracy is {pgd:.3f} under PGD-{steps} on the cross-entropy and {margin:.3f} under PGD "
        "on the margin",
    )  # fmt: skip


def black_box_beats_white_box(
    name: str, white_box: float, black_box: float, limits: SanityConfig
) -> Flag:
    """Flag a network that is fooled better without its gradients than with them."""
    return _flag(
        f"{name}_beats_white_box", white_box - black_box, limits.black_box_gap,
        f"accuracy is {white_box:.3f} under all attacks that use the network's gradients and "
        f"{black_box:.3f} under {name}, which does not",
    )  # fmt: skip


def outside(share: float) -> Flag:
    """Flag an attack whose images are not allowed, so that its figure is about nothing."""
    return _flag(
        "attack_leaves_threat_model", share, 0.0,
        f"{share:.1%} of the attacked images of one attack lie outside the threat model",
    )  # fmt: skip


def not_falling(name: str, accuracy: Mapping[float, float], limits: SanityConfig) -> Flag:
    """Flag an attack that does less harm with a larger eps."""
    ordered = [accuracy[eps] for eps in sorted(accuracy)]
    rise = max((after - before for before, after in pairwise(ordered)), default=0.0)
    return _flag(
        f"{name}_not_falling_with_eps", rise, limits.eps_gap,
        f"accuracy under {name} rises by {rise:.3f} from one eps to a larger one",
    )  # fmt: skip


def noise_as_strong(attack: str, share: float, limits: SanityConfig) -> Flag:
    """Flag an attack that does no more harm than random noise of the same size.

    Harm to one image is how far the true class loses its lead, so that an attack counts as
    stronger also where the network holds.
    """
    return _flag(
        f"noise_as_strong_as_{attack}", share, limits.noise_wins,
        f"random noise harms {share:.1%} of the right answers at least as much as {attack} does",
    )  # fmt: skip


def saturated(share: float, limits: SanityConfig) -> Flag:
    """Flag a network so sure of what it gets right that float32 rounds its probability to one."""
    return _flag(
        "confidence_saturated", share, limits.saturation,
        f"{share:.1%} of the correct answers have a probability of exactly 1 in float32, where the "
        "cross-entropy has no gradient left",
    )  # fmt: skip


def same_answer(share: float, limits: SanityConfig) -> Flag:
    """Flag a network that is dead for many images: what does not look cannot be fooled."""
    return _flag(
        "same_answer_for_many", share, limits.same_answer,
        f"{share:.1%} of the images get the very same probabilities: part of the network is dead "
        "and does not see them",
    )  # fmt: skip


def same_class(share: float, limits: SanityConfig) -> Flag:
    """Flag a network that has learnt nothing: one that always says the same is never fooled."""
    return _flag(
        "same_class_for_all", share, limits.same_class,
        f"{share:.1%} of the images of other classes are given the commonest answer: the network "
        "has not learnt to tell them apart, and there is little to fool",
    )  # fmt: skip


def unsteady(difference: float, limits: SanityConfig) -> Flag:
    """Flag a network whose answer depends on chance or on the other images of the batch."""
    return _flag(
        "answers_not_repeatable", difference, limits.unsteady,
        f"the same image gets probabilities that differ by {difference:.2g} when it is asked in "
        "another batch: the network is random or in train mode",
    )  # fmt: skip


def _flag(name: str, value: float, threshold: float, sentence: str) -> Flag:
    return Flag(
        name=name, triggered=value > threshold, value=value, threshold=threshold, sentence=sentence
    )
