"""Sanity checks of detectors: figures that you should not trust."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from medspark.defend.detect.adaptive import Target, key_of
from medspark.defend.detect.detector import Detector
from medspark.evaluate.metrics import auroc
from medspark.evaluate.sanity import Flag
from medspark.evaluate.summary import Array, Arrays, Trial

__all__ = ["area_under_attack", "by_chance", "detector_flags"]

_UNSTEADY = 0.01  # change of a score in another batch, in deviations of the clean scores
_SAME_FILE = 0.1  # distance of AUROC from .5 between images that are one file
_MEMORY = 0.1  # distance of AUROC from .5 between clean validation and test images
_GAP = 0.1  # AUROC on test images minus that on validation images; more where they are few


def detector_flags(
    arrays: Arrays,
    detectors: Sequence[Detector],
    targets: Sequence[Target],
    trials: Sequence[Trial],
    *,
    calibration: Array,
    validated: Sequence[float],
) -> list[Flag]:
    """Return the checks of the ``targets`` among ``detectors``, on the arrays of an examination.

    ``calibration`` (n, G) are scores of clean validation images, ``validated`` (G,) the AUROC of
    each detector on validation images. The name of a flag begins with the key of its detector.
    """
    found = []
    for number, detector in enumerate(detectors):
        if not any(target.detector is detector for target in targets):
            continue
        name, clean = key_of(detector), arrays["clean/scores"][:, number]
        area, fooled = area_under_attack(arrays, trials, number)
        found.append(_chance(name, area, len(clean), fooled))
        drift = _drift(clean, calibration[:, number])
        gain = (area - validated[number]) / max(_GAP, 3 * _spread(len(clean), min(fooled)))
        found.append(_test_images(name, drift, gain))
        again = arrays["again/scores"][:, number]
        if not np.isnan(again).any():
            found.append(_repeatable(name, clean, again))
            found.append(_quantisation(name, clean, arrays["same_file/scores"][:, number]))
    outside = [values.mean() for name, values in arrays.items() if name.endswith("/outside")]
    share = float(max(outside, default=0.0))
    found.append(
        _flag("attack_leaves_threat_model", share, 0.0,
              f"{share:.1%} of the images of one attack lie outside the threat model")
    )  # fmt: skip
    return found


def _chance(name: str, area: float, honest: int, fooled: Sequence[int]) -> Flag:
    """Flag a detector whose mean AUROC over attacks is within chance of .5, or below it.

    ``fooled`` holds the number of images of each attack. The limit of the mean is the mean of the
    limits, as if all attacks fooled the same images; one with few images has a high limit.
    """
    limit = float(np.mean([by_chance(honest, count) for count in fooled]))
    few, many = min(fooled), max(fooled)
    counted = f"{few} to {many} such images" if many > few else f"such images: {few}"
    return Flag(
        name=f"{name}: no_better_than_chance",
        triggered=area <= limit,
        value=area,
        threshold=limit,
        sentence=f"{name} has an AUROC of {area:.3f} under the oblivious attacks, and chance alone "
        f"reaches {limit:.3f} ({counted})",
    )


def _repeatable(name: str, clean: Array, again: Array) -> Flag:
    """Flag a detector whose score of an image changes with the batch, or by chance."""
    change = float(np.abs(clean - again).max() / max(clean.std(), 1e-12))
    return _flag(
        f"{name}: scores_not_repeatable", change, _UNSTEADY,
        f"a score of {name} changes by {change:.2g} deviations in another batch",
    )  # fmt: skip


def _quantisation(name: str, clean: Array, same_file: Array) -> Flag:
    """Flag a detector that tells an image from one that is the same file in whole levels."""
    area = _area(clean, same_file)
    return _flag(
        f"{name}: reads_quantisation", abs(area - 0.5), _SAME_FILE,
        f"{name} tells images from others that are the same file when rounded to whole levels "
        f"(AUROC {area:.3f}), so it may know attacks by their fractions of a level",
    )  # fmt: skip


def _test_images(name: str, drift: float, gain: float) -> Flag:
    """Flag a detector that knows the test images: other scores there, or better figures.

    Both are multiples of what chance allows.
    """
    return _flag(
        f"{name}: fitted_on_test_images", max(drift, gain), 1.0,
        f"{name} scores clean test images unlike clean validation images ({drift:.2f} times what "
        f"is allowed), or knows attacks better on test images ({gain:.2f} times)",
    )  # fmt: skip


def _drift(clean: Array, calibration: Array) -> float:
    """Return how far AUROC between two sets of clean images is from .5, by what is allowed."""
    allowed = max(_MEMORY, 4 * _spread(len(calibration), len(clean)))
    return abs(_area(calibration, clean) - 0.5) / allowed


def area_under_attack(
    arrays: Arrays, trials: Sequence[Trial], number: int
) -> tuple[float, list[int]]:
    """Return the mean AUROC over the oblivious attacks, and how many images each of them fools.

    Attacks that fool none are left out; without any, AUROC is .5, as of one image.
    """
    honest = np.concatenate([arrays[f"{c}/scores"][:, number] for c in ("clean", "noisy")])
    areas, counts = [], []
    for trial in trials:
        fooled = arrays["clean/right"] & ~arrays[f"{trial.key}/right"]
        if fooled.any():
            areas.append(_area(honest, arrays[f"{trial.key}/scores"][fooled, number]))
            counts.append(int(fooled.sum()))
    return (float(np.mean(areas)), counts) if areas else (0.5, [1])


def _area(honest: Array, attacked: Array) -> float:
    truth = np.arange(len(honest) + len(attacked)) >= len(honest)
    area = auroc(truth, np.concatenate([honest, attacked]))
    return 0.5 if area is None else area


def _spread(first: int, second: int) -> float:
    """Return the standard deviation of AUROC between two equal samples (Mann and Whitney 1947)."""
    return math.sqrt((first + second + 1) / (12 * max(first * second, 1)))


def by_chance(first: int, second: int, *, level: float = 0.025) -> float:
    """Return the largest AUROC that chance reaches with a probability of more than ``level``.

    It is at most 1. For two samples of up to 20,000 pairs in which one has at most 20 images, the
    distribution is the exact one without ties (Mann and Whitney 1947), because the normal one puts
    the limit beyond 1 where few images are fooled.
    """
    few, many = sorted((first, second))
    if few > 20 or few * many > 20_000:
        return min(1.0, 0.5 + 1.96 * _spread(few, many))
    # How many orders of both samples have each number of inversions: a Gaussian binomial, which is
    # the product of (1 - x^(many + i)) / (1 - x^i).
    counts = np.zeros(few * many + 1, dtype=object)
    counts[0] = 1
    for i in range(1, few + 1):
        counts[many + i :] = counts[many + i :] - counts[: max(len(counts) - many - i, 0)]
        for rest in range(i):
            counts[rest::i] = np.cumsum(counts[rest::i])
    # By symmetry, the first sums are also the probabilities of an AUROC at least as high.
    tail = np.cumsum(counts).astype(float) / math.comb(few + many, few)
    beyond = int((tail <= level).sum())  # this many of the highest values are rarer
    return 1 - beyond / (few * many)


def _flag(name: str, value: float, threshold: float, sentence: str) -> Flag:
    return Flag(
        name=name, triggered=value > threshold, value=value, threshold=threshold, sentence=sentence
    )
