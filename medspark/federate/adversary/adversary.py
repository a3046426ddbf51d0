"""The interface of a malicious client: pure functions for the phases of a round.

Before training, ``prepare`` uses the round's network, and ``poison`` changes images and labels.
The client trains ``passes`` times on them; meanwhile ``constrain`` keeps the update inconspicuous.
After it, ``send`` replaces the update. Images are floats in [0, 1], (B, C, H, W); labels are
classes (B,); an update is one vector (d,), trained weights minus the round's weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from medspark.config import Config
from medspark.federate.aggregate.rule import Matrix, Vector
from medspark.seeding import uniform

if TYPE_CHECKING:  # reading and checking the configuration must not import torch
    from torch import Tensor, nn

__all__ = ["Adversary", "Backdoor", "Known", "chosen"]


@dataclass(frozen=True)
class Known:
    """What a malicious client knows about the round besides its own data.

    ``key`` seeds its random choices. It is malicious client ``number`` of the federation; ``liars``
    of the round's ``clients`` are malicious, and it has the ``share`` of all images of the round.
    Labels are one of ``classes``. ``edge`` (E, C, H, W) are tail images that the backdoor should
    misclassify, ``edge_labels`` (E,) their true classes. ``honest`` (m, d) are the honest updates
    of the round. ``last_change`` (d,) is the last round's change of the weights. ``pattern``
    (C, h, w) is the trigger that it, or an accomplice, prepared last.
    """

    key: int = 0
    number: int = 0
    liars: int = 1
    clients: int = 1
    share: float = 1.0
    round: int = 0
    classes: int = 2
    edge: Tensor | None = None
    edge_labels: Tensor | None = None
    honest: Matrix | None = None
    last_change: Vector | None = None
    pattern: Tensor | None = None


class Adversary(Config):
    """Base of all adversaries. It changes nothing."""

    # What the server's simulation has to provide in ``Known``, besides what is always there. An
    # adversary that needs the honest updates sends what it computes from them, and trains nothing.
    needs_edge: ClassVar[bool] = False
    needs_honest: ClassVar[bool] = False
    needs_last_change: ClassVar[bool] = False
    # Whether an aggregation rule ever sees what it sends.
    reaches_rules: ClassVar[bool] = True

    def prepare(
        self,
        model: nn.Module,  # noqa: ARG002
        images: Tensor,  # noqa: ARG002
        labels: Tensor,  # noqa: ARG002
        known: Known,
    ) -> Known:
        """Return ``known`` with what the adversary learns from the round's ``model``."""
        return known

    def poison(self, images: Tensor, labels: Tensor, known: Known) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return the images and labels to train on."""
        return images, labels

    def passes(self, usual: int) -> int:
        """Return how often it trains on its images in a round, in place of ``usual`` times."""
        return usual

    def constrain(self, update: Vector, known: Known) -> Vector:  # noqa: ARG002
        """Return the update from which training continues."""
        return update

    def send(self, update: Vector, known: Known) -> Vector:  # noqa: ARG002
        """Return the vector that is sent to the server in place of ``update``."""
        return update


class Backdoor(Adversary):
    """Base of all backdoors: a target class, projection near the round's weights, and scaling.

    Projection and model replacement: Wang et al. 2020 (PGD in weight space); Bagdasaryan et al.
    2020. The defaults do neither: black-box.
    """

    target: int = Field(0, ge=0, description="class that poisoned images should be assigned")
    epochs: int | None = Field(
        None, ge=1, description="passes over its images in a round; by default as honest clients"
    )
    radius: float | None = Field(
        None, gt=0, description="largest distance from the round's weights (PGD); none: any"
    )
    radius_decay: float = Field(
        1.0, gt=0, le=1, description="factor on the radius per round, against Krum"
    )
    every: int = Field(10, ge=1, description="steps between projections; the last step has one too")
    replace: bool = Field(
        False, description="scale the update by all images of the round over the client's own"
    )

    def passes(self, usual: int) -> int:
        """Return ``epochs``, or ``usual`` without it."""
        return usual if self.epochs is None else self.epochs

    def constrain(self, update: Vector, known: Known) -> Vector:
        """Return the nearest update within the radius."""
        if self.radius is None:
            return update
        radius, norm = self.radius * self.radius_decay**known.round, np.linalg.norm(update)
        return update * (radius / norm) if norm > radius else update

    def send(self, update: Vector, known: Known) -> Vector:
        """Return the update, scaled so that the mean of the round becomes it if ``replace``.

        Several malicious clients share the factor, so that the mean becomes their mean.
        """
        return update / (known.share * known.liars) if self.replace else update


def chosen(count: int, share: float, key: int) -> list[int]:
    """Return the sorted indices of a ``share`` of ``count`` things, chosen by the key."""
    queue = np.argsort(uniform(key, np.arange(count)))
    return sorted(queue[: round(share * count)].tolist())
