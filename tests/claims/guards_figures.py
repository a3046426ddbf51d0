"""The figures of cells of guards: pure functions of the result documents of jobs/detect.py.

A cell is a dictionary: what was asked (``data``, ``network``, ``training``, ``seed``), how many
``patients`` the test images are of, and under ``detect`` (and ``denoise``, if a denoiser was
trained) a detection as ``trimmed`` keeps it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any

from medspark.eps import eps_text
from medspark.evaluate.decision import wilson

Cell = Mapping[str, Any]
Group = tuple[str, str, str]  # set, network, training

SETS = {"xrays": "chest X-rays", "malaria": "malaria cells", "six": "six classes"}
NETWORKS = {"mobilenetv2_100": "MobileNet-V2", "densenet121": "DenseNet121"}
TRAININGS = {"plain": "plain", "robust": "adversarial"}
SEEDS = (0, 1, 2)
ATTACKS = {"fgsm": "FGSM", "pgd": "PGD", "pgd_margin": "margin PGD", "cw": "C&W"}
GOAL = 0.98  # AUROC of the guard on plain networks, under each of the attacks that do not know it
RATE = 0.05  # the false-positive rate of the guards


def name_of(data: str, network: str, training: str, seed: int) -> str:
    """Return the name of a cell."""
    return f"{data}-{network}-{training}-{seed}"


def missing(cells: Iterable[Cell]) -> list[str]:
    """Return the names of the planned cells that are not among ``cells``."""
    done = {name_of(*group_of(cell), cell["seed"]) for cell in cells}
    planned = (name_of(*each) for each in product(SETS, NETWORKS, TRAININGS, SEEDS))
    return [name for name in planned if name not in done]


def group_of(cell: Cell) -> Group:
    """Return what the seeds of a cell have in common."""
    return cell["data"], cell["network"], cell["training"]


def groups(cells: Iterable[Cell]) -> dict[Group, list[Cell]]:
    """Return the cells by what their seeds have in common."""
    found: dict[Group, list[Cell]] = {}
    for cell in cells:
        found.setdefault(group_of(cell), []).append(cell)
    return found


def trimmed(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a cell keeps of the result document of a detection."""
    kept = ("images", "accuracy", "chosen", "undetected_without_guard", "surrogates")
    rates = ("asked", "rate", "interval", "images")
    return _rounded({
        **{key: result[key] for key in kept},
        "false_positives": {key: result["false_positives"][key] for key in rates},
        "detectors": [_line(figures) for figures in result["detectors"]],
        "flags": [
            {"name": flag["name"], "sentence": flag["sentence"]}
            for flag in result["flags"] if flag["triggered"]
        ],
    })  # fmt: skip


def _line(figures: Mapping[str, Any]) -> dict[str, Any]:
    adaptive = figures["adaptive"]
    bound = "reason" in adaptive
    worst = adaptive["upper_bound"] if bound else adaptive
    kept = ("auroc", "undetected_and_wrong", "accuracy_with_guard", "direct")
    return {
        **{key: figures[key] for key in ("name", "layer", "attack", "fooled", "auroc")},
        "eps": eps_text(figures["eps"]),
        "undetected_and_wrong": figures["undetected_and_wrong"],
        "adaptive": worst and {key: worst[key] for key in kept} | {"bound": bound},
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


@dataclass(frozen=True)
class Estimate:
    """A figure, its 95 % interval, and whether an attack on the detector itself would lower it."""

    value: float
    low: float
    high: float
    bound: bool = False
    flagged: bool = False


@dataclass(frozen=True)
class Measured:
    """A share or an AUROC in one cell, from ``count`` independent images."""

    value: float
    count: float
    bound: bool = False
    flagged: bool = False


def pooled(found: Sequence[Measured | None]) -> Estimate | None:
    """Return the mean over cells with its interval (Wilson 1927); None where there is no figure.

    An AUROC of m and n images has a variance of at most that of a share of the fewer of both
    (Birnbaum and Klose 1957), so the interval of a share holds for it too.
    """
    known = [each for each in found if each is not None]
    if not known:
        return None
    value, count = fmean(each.value for each in known), sum(each.count for each in known)
    low, high = wilson(value * count, count)
    return Estimate(
        value, min(low, value), max(high, value),
        any(each.bound for each in known), any(each.flagged for each in known),
    )  # fmt: skip


@dataclass(frozen=True)
class Detection:
    """One detection of a cell, at one budget.

    A detector is named by itself and its layer; of None there is no figure.
    """

    cell: Cell
    eps: str
    kind: str = "detect"

    @property
    def document(self) -> Mapping[str, Any]:
        """What ``trimmed`` kept."""
        found: Mapping[str, Any] = self.cell[self.kind]
        return found

    @property
    def guard(self) -> tuple[str, str]:
        """Name and layer of the detector that validation images chose."""
        chosen = self.document["chosen"]
        return chosen["name"], chosen["layer"]

    def layer_of(self, name: str) -> tuple[str, str] | None:
        """Return name and layer of a detector on the layer that validation images chose."""
        for line in self.document["detectors"]:
            if line["name"] == name and line["adaptive"] and line["adaptive"]["direct"]:
                return name, line["layer"]
        return None

    def oblivious(self, key: tuple[str, str] | None, attack: str) -> Measured | None:
        """Return AUROC under an attack that does not know the detector."""
        for line in self._lines(key):
            if line["attack"] == attack and line["auroc"] is not None:
                count = min(self.cell["patients"], line["fooled"])
                return Measured(line["auroc"], count, flagged=self._flagged(key))
        return None

    def mean_oblivious(self, key: tuple[str, str] | None) -> Measured | None:
        """Return the mean of AUROC over the attacks that fool an image."""
        found = [each for name in ATTACKS if (each := self.oblivious(key, name))]
        if not found:
            return None
        count = min(each.count for each in found)
        return Measured(fmean(e.value for e in found), count, flagged=self._flagged(key))

    def adaptive(self, key: tuple[str, str] | None) -> Measured | None:
        """Return AUROC under the worst attack for each image, network and detector together."""
        document = self.document
        broken = document["undetected_without_guard"][self.eps] - (1 - document["accuracy"])
        count = min(self.cell["patients"], max(1, round(broken * document["images"])))
        for line in self._lines(key):
            worst = line["adaptive"]
            if worst and worst["auroc"] is not None:
                return Measured(worst["auroc"], count, worst["bound"], self._flagged(key))
        return None

    def undetected(self, key: tuple[str, str] | None, *, adaptive: bool) -> Measured | None:
        """Return the share of images that are wrong and not caught, under the worst attack.

        The worst of the oblivious attacks is one attack for all images.
        """
        lines, name = self._lines(key), "undetected_and_wrong"
        if not lines:
            return None
        worst = lines[0]["adaptive"]
        if adaptive and worst is None:
            return None
        value = worst[name] if adaptive else max(line[name] for line in lines)
        bound = adaptive and worst["bound"]
        return Measured(value, self.cell["patients"], bound, self._flagged(key))

    def alone(self) -> Measured:
        """Return the share of images that any of the attacks makes wrong: no guard catches them."""
        value = self.document["undetected_without_guard"][self.eps]
        return Measured(value, self.cell["patients"])

    def _lines(self, key: tuple[str, str] | None) -> list[Mapping[str, Any]]:
        return [
            line
            for line in self.document["detectors"]
            if line["eps"] == self.eps and key == (line["name"], line["layer"])
        ]

    def _flagged(self, key: tuple[str, str] | None) -> bool:
        return key is not None and any(
            flag["name"].startswith(f"{key[0]}:{key[1]}: ") for flag in self.document["flags"]
        )


def reaches_goal(cell: Cell) -> bool:
    """Return whether the guard of a cell has the AUROC of the goal under each oblivious attack.

    An attack that fools no image leaves nothing to detect; one that was not tried counts.
    """
    detection = Detection(cell, "2/255")
    tried = {line["attack"] for line in detection.document["detectors"]}
    areas = [detection.oblivious(detection.guard, attack) for attack in ATTACKS]
    known = [area.value for area in areas if area is not None]
    return set(ATTACKS) <= tried and bool(known) and min(known) >= GOAL


def saves(cells: Sequence[Cell], eps: str) -> tuple[Estimate, float] | None:
    """Return the share of images that the guard saves under adaptive attacks, and by chance.

    The guard is the detector that validation images chose. Saved are the images that are wrong
    without it and that no attack found brings past it. What is wrong and undetected is a part of
    what is wrong, so every guard saves something or nothing. To count, the interval has to lie
    above what refusing images by chance saves, at the guard's own rate of false positives, which
    is the second number.
    """
    found, chance = [], []
    for cell in cells:
        detection = Detection(cell, eps)
        alone, left = detection.alone(), detection.undetected(detection.guard, adaptive=True)
        if left is None or left.bound:
            return None
        rate = detection.document["false_positives"]["rate"]
        chance.append(max(rate, RATE) * alone.value)
        found.append(Measured(alone.value - left.value, left.count, flagged=left.flagged))
    share = pooled(found)
    return share and (share, fmean(chance))
