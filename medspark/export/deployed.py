"""Attack an exported model: the deployed graph itself, which has no gradients.

Transfer makes the images against the float twin. Straight-through is PGD on a fake-quantised twin
in torch. Square only queries the deployed graph. The worst case is the worst of them per image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from medspark.attacks.keyed_random import KeyedRandom
from medspark.attacks.losses import cross_entropy, margin
from medspark.attacks.pgd import pgd
from medspark.attacks.suite import Attack, one_after_another
from medspark.attacks.threat import ThreatModel
from medspark.evaluate.pieces import AttackPieces, SplitPieces, deciding_network
from medspark.evaluate.robust import Batch, attack_all
from medspark.evaluate.summary import Array, Arrays
from medspark.export.runtime import DeployedModel
from medspark.export.straight_through import StraightThrough
from medspark.models.card import ModelCard
from medspark.models.deciding import deciding

__all__ = ["STRAIGHT_THROUGH", "DeployedClassifier", "DeployedJob", "straight_through"]

STRAIGHT_THROUGH = "straight_through"


class DeployedClassifier(nn.Module):
    """Logits (B, K) of images (B, C, H, W) in [0, 1], from an exported model; no gradients."""

    gradients = False

    def __init__(self, model: DeployedModel) -> None:
        super().__init__()
        self._model = model

    @property
    def card(self) -> ModelCard:
        """The model's card."""
        return self._model.card

    def __deepcopy__(self, _: dict[int, Any]) -> Self:
        """Return the classifier itself: its graph cannot be copied, and nothing changes it."""
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, K)."""
        pixels = images.detach().cpu().contiguous().numpy()
        return torch.from_numpy(self._model.logits(pixels)).to(images.device)


def straight_through(twin: nn.Module, *, steps: int) -> Attack:
    """Return PGD on the fake-quantised ``twin``: on the cross-entropy, then on the margin."""

    def climb(loss: Any) -> Attack:
        def attack(
            _: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: KeyedRandom
        ) -> Tensor:
            start = threat.random_start(images, rng.noise(images, STRAIGHT_THROUGH))
            return pgd(twin, images, labels, threat=threat, steps=steps, loss=loss, start=start)

        return attack

    return one_after_another([climb(cross_entropy), climb(margin)])


@dataclass(frozen=True)
class DeployedJob(AttackPieces):
    """Attacks on the exported model in the folder ``model``."""

    twin: Path  # the folder of the torch network that it was made from
    surrogate: Path | None  # the fake-quantised graph in ONNX; None for a float graph

    @property
    def own_attacks(self) -> tuple[str, ...]:
        """The names of the attacks besides those of the configuration."""
        return () if self.surrogate is None else (STRAIGHT_THROUGH,)

    def piece_arrays(self, batches: Iterator[Batch]) -> Arrays:
        """Return the arrays of the images under attack."""
        own: dict[str, Attack] = {}
        if self.surrogate is not None:
            twin = deciding(_fake_quantised(self.surrogate), _deployed(self.model).card)
            own[STRAIGHT_THROUGH] = straight_through(twin, steps=self.config.steps)
        return attack_all(
            _deciding(self.model),
            batches,
            self.config,
            surrogates=[deciding_network(self.twin)],
            own_attacks=own,
            probed_below=self.config.probed_below(self.rows),
        )


@dataclass(frozen=True)
class ComparedJob(SplitPieces):
    """All settings that a worker needs to get the logits of any piece from twin and exports."""

    twin: Path
    exports: tuple[Path, ...]
    shards: Path
    split: str
    total: int
    piece: int
    batch: int
    work: Path

    @property
    def rows(self) -> Array:
        """The rows of all images of the split."""
        return np.arange(self.total)

    @property
    def batch_size(self) -> int:
        """The number of images per batch."""
        return self.batch

    @torch.no_grad()
    def piece_arrays(self, batches: Iterator[Batch]) -> Arrays:
        """Return ``labels``, and the logits of the ``twin`` and of every export by its name.

        The largest logit is the card's decision.
        """
        networks: dict[str, nn.Module] = {"twin": deciding_network(self.twin)}
        networks |= {path.name: _deciding(path) for path in self.exports}
        parts: dict[str, list[Tensor]] = {}
        for images, labels, rows in batches:
            answers = {name: network(images) for name, network in networks.items()}
            for name, values in ({"rows": rows, "labels": labels} | answers).items():
                parts.setdefault(name, []).append(values)
        return {name: torch.cat(values).numpy() for name, values in parts.items()}


# Cached, because a worker does many pieces with the same networks.
@lru_cache(maxsize=8)
def _deployed(folder: Path) -> DeployedClassifier:
    return DeployedClassifier(DeployedModel.load(folder))


def _deciding(folder: Path) -> nn.Module:
    model = _deployed(folder)
    return deciding(model, model.card)


@lru_cache(maxsize=4)
def _fake_quantised(path: Path) -> StraightThrough:
    return StraightThrough(path.read_bytes())
