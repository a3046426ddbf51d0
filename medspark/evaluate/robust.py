"""Accuracy under attack: what is left of a classifier when somebody means to fool it.

Every rank may hold a slice of the images: what it finds about its own is gathered, and every
rank ends up with the report on all of them.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn

from medspark.attacks.fgsm import one_step
from medspark.attacks.gradient import input_gradient, zero_gradient
from medspark.attacks.losses import correct, cross_entropy, margin, rescaled
from medspark.attacks.pgd import pgd
from medspark.attacks.threat import ThreatModel, keyed_noise
from medspark.config import Config, Eps
from medspark.evaluate import sanity
from medspark.evaluate.deploy import evaluation_copy
from medspark.evaluate.metrics import Metrics, metrics
from medspark.evaluate.sanity import Flag, SanityConfig

_LOGGER = logging.getLogger(__name__)

# Images (B, C, H, W) in [0, 1], labels (B,), and the images' numbers in the data set (B,).
Batch = tuple[Tensor, Tensor, Tensor]
Array = npt.NDArray[Any]
Gather = Callable[[Array], Array]


class EvaluateConfig(Config):
    """Which attacks a classifier has to stand at the end of a run."""

    attacks: tuple[Literal["fgsm", "pgd"], ...] = Field(("fgsm", "pgd"))
    norm: Literal["linf", "l2"] = Field("linf", description="how a perturbation is measured")
    eps: tuple[Eps, ...] = Field(
        (1 / 255, 2 / 255, 4 / 255), description="budgets in [0, 1] pixels, as 2/255"
    )
    steps: int = Field(20, ge=1, description="steps of PGD")
    restarts: int = Field(1, ge=1, description="random starts of PGD; more only for images held")
    batch_size: int = Field(128, ge=1, description="images attacked together")
    seed: int = Field(0, ge=0, description="of the random starts")
    sanity_images: int = Field(
        128, ge=0, description="images that the sanity checks attack once more, 0 for no checks"
    )
    sanity: SanityConfig = SanityConfig()

    def threat(self, eps: float) -> ThreatModel:
        """Return the threat model of one budget."""
        return ThreatModel(norm=self.norm, eps=eps)


@dataclass(frozen=True)
class AttackResult:
    """What is left under one attack at one budget."""

    name: str
    steps: int
    eps: float
    metrics: Metrics

    def as_json(self) -> dict[str, Any]:
        """Return the result as the job reports it, eps in grey levels of an 8-bit image."""
        head = {"name": self.name, "steps": self.steps, "eps_255": _grey_levels(self.eps)}
        return head | self.metrics.model_dump()


@dataclass(frozen=True)
class RobustReport:
    """Figures clean and under attack, and the signs that they should not be believed."""

    images: int
    clean: Metrics
    attacks: list[AttackResult]
    flags: list[Flag] = field(default_factory=list)
    # Sorted by row: labels (N,), and probabilities (N, K) clean and by "attack@eps_255".
    labels: Array = field(default_factory=lambda: np.empty(0), repr=False)
    probabilities: dict[str, Array] = field(default_factory=dict, repr=False)

    @property
    def believable(self) -> bool:
        """Whether no sanity check triggered."""
        return not any(flag.triggered for flag in self.flags)

    def as_json(self) -> dict[str, Any]:
        """Return the report as the result document of a job holds it."""
        return {
            "images": self.images,
            "clean": self.clean.model_dump(),
            "attacks": [attack.as_json() for attack in self.attacks],
            "believable": self.believable,
            "flags": [flag.model_dump() for flag in self.flags],
        }


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    config: EvaluateConfig,
    *,
    gather: Gather | None = None,
    positive: int | None = None,
) -> RobustReport:
    """Return how good ``model`` is on ``batches``, clean and under every attack.

    ``gather`` joins the same array of all ranks along its first axis; a rank calls it equally
    often whatever it holds. ``model`` is not changed: a copy in eval mode and float32 is
    attacked. ``positive`` is the class that sensitivity is about, the last by default.
    """
    found = _Findings()
    attacked: nn.Module | None = None
    for images, labels, rows in batches:
        if attacked is None:
            attacked = evaluation_copy(model, images[:2])
        _attack_batch(attacked, images, labels, rows, config, found)
    return _report(found.gathered(gather), config, positive)


class _Findings:
    """Arrays by name, one row per image, collected batch by batch."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Array]] = defaultdict(list)

    def add(self, name: str, values: Tensor) -> None:
        self._parts[name].append(values.detach().cpu().numpy())

    def gathered(self, gather: Gather | None) -> dict[str, Array]:
        """Return every array over all ranks, each image once, in the order of the rows."""
        join = gather or (lambda values: values)
        joined = {name: join(np.concatenate(parts)) for name, parts in self._parts.items()}
        # A rank may repeat an image to fill its share.
        _, first = np.unique(joined["rows"], return_index=True)
        return {name: values[first] for name, values in joined.items()}


@torch.no_grad()
def _probabilities(model: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = model(images)
    return logits.softmax(dim=1)


def _attack_batch(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    rows: Tensor,
    config: EvaluateConfig,
    found: _Findings,
) -> None:
    # One gradient at the clean images serves the clean figures and FGSM at every eps.
    gradient, logits = input_gradient(model, images, labels, loss=cross_entropy)
    found.add("rows", rows)
    found.add("labels", labels)
    found.add("clean", logits.softmax(dim=1))
    found.add("zero_gradient", zero_gradient(gradient))
    for eps in config.eps:
        threat = config.threat(eps)
        if "fgsm" in config.attacks:
            found.add(
                _key("fgsm", eps), _probabilities(model, one_step(images, gradient, threat=threat))
            )
        if "pgd" in config.attacks:
            found.add(
                _key("pgd", eps), _pgd_probabilities(model, images, labels, rows, threat, config)
            )
    if config.sanity_images > 0:
        _doubt_batch(model, images, labels, rows, config, found)


def _pgd_probabilities(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    rows: Tensor,
    threat: ThreatModel,
    config: EvaluateConfig,
) -> Tensor:
    attack = partial(pgd, model, threat=threat, steps=config.steps)
    noise = keyed_noise(images, rows, seed=config.seed, purpose="pgd/0")
    start = threat.random_start(images, noise)
    probabilities = _probabilities(model, attack(images, labels, start=start))
    for restart in range(1, config.restarts):
        held = correct(probabilities, labels).nonzero().flatten()
        if len(held) == 0:
            break
        clean, truth = images[held], labels[held]
        noise = keyed_noise(clean, rows[held], seed=config.seed, purpose=f"pgd/{restart}")
        start = threat.random_start(clean, noise)
        again = _probabilities(model, attack(clean, truth, start=start, stop_when_fooled=True))
        fooled = ~correct(again, truth)
        probabilities[held[fooled]] = again[fooled]
    return probabilities


def _doubt_batch(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    rows: Tensor,
    config: EvaluateConfig,
    found: _Findings,
) -> None:
    # Not-a-number marks the images that the sanity checks leave out.
    margin_held = torch.full((len(rows),), torch.nan)
    noise_held, unsteady = margin_held.clone(), margin_held.clone()
    chosen = (rows < config.sanity_images).nonzero().flatten()
    if len(chosen) > 0:
        images, labels, rows = images[chosen], labels[chosen], rows[chosen]
        threat = config.threat(_sanity_eps(config))
        loss = rescaled(margin)
        attacked = pgd(
            model, images, labels, threat=threat, steps=config.steps, loss=loss,
            stop_when_fooled=True,
        )  # fmt: skip
        margin_held[chosen] = correct(_probabilities(model, attacked), labels).float()
        noise = keyed_noise(images, rows, seed=config.seed, purpose="noise")
        noisy = threat.project(images + threat.eps * (2 * noise - 1).sign(), images)
        noise_held[chosen] = correct(_probabilities(model, noisy), labels).float()
        unsteady[chosen] = _unsteadiness(model, images)
    found.add("margin_held", margin_held)
    found.add("noise_held", noise_held)
    found.add("unsteady", unsteady)


def _unsteadiness(model: nn.Module, images: Tensor) -> Tensor:
    """Return how far each image's probabilities move when it comes in other company."""
    together = _probabilities(model, images)
    halves = [_probabilities(model, half) for half in images.chunk(2)]
    return (together - torch.cat(halves)).abs().amax(1)


def _report(found: dict[str, Array], config: EvaluateConfig, positive: int | None) -> RobustReport:
    labels = found["labels"]
    score = partial(metrics, labels, positive=positive)
    attacks = [
        AttackResult(name, config.steps if name == "pgd" else 1, eps, score(found[_key(name, eps)]))
        for name in config.attacks
        for eps in config.eps
    ]
    kept = {name: found[name] for name in ["clean", *(_key(a.name, a.eps) for a in attacks)]}
    return RobustReport(
        images=len(labels),
        clean=score(found["clean"]),
        attacks=attacks,
        flags=_flags(found, config),
        labels=labels,
        probabilities=kept,
    )


def _flags(found: dict[str, Array], config: EvaluateConfig) -> list[Flag]:
    limits, labels = config.sanity, found["labels"]

    def accuracy(name: str, chosen: Array | slice = slice(None)) -> float:
        return float((found[name].argmax(1) == labels)[chosen].mean())

    flags = [
        sanity.zero_gradients(float(found["zero_gradient"].mean()), limits),
        sanity.saturated(_saturated_share(found["clean"], labels), limits),
    ]
    for name in config.attacks:
        by_eps = {eps: accuracy(_key(name, eps)) for eps in config.eps}
        flags.append(sanity.not_falling(name, {0.0: accuracy("clean")} | by_eps, limits))
    if config.sanity_images == 0 or not config.eps:
        return flags
    eps, chosen = _sanity_eps(config), ~np.isnan(found["margin_held"])
    held = float(found["margin_held"][chosen].mean())
    flags.append(sanity.unsteady(float(found["unsteady"][chosen].max()), limits))
    if "fgsm" in config.attacks:
        flags.append(sanity.fgsm_above_margin(accuracy(_key("fgsm", eps), chosen), held, limits))
    if "pgd" in config.attacks:
        under_pgd = accuracy(_key("pgd", eps), chosen)
        noise = float(found["noise_held"][chosen].mean())
        flags.append(sanity.pgd_above_margin(under_pgd, held, limits))
        flags.append(
            sanity.noise_as_strong(accuracy("clean", chosen), noise, under_pgd, eps, limits)
        )
    return flags


def _saturated_share(probabilities: Array, labels: Array) -> float:
    right = probabilities.argmax(1) == labels
    return float((probabilities[right].max(1) >= 1.0).mean()) if right.any() else 0.0


def _sanity_eps(config: EvaluateConfig) -> float:
    # The largest: where an honest attack has won, one that was kept from winning stands out.
    return max(config.eps)


def _key(attack: str, eps: float) -> str:
    return f"{attack}@{_grey_levels(eps):g}"


def _grey_levels(eps: float) -> float:
    levels = round(eps * 255, 4)
    return int(levels) if levels == int(levels) else levels
