"""SFAT: give clients with a small adversarial loss more weight (Zhu et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from medspark.config import Config
from medspark.federate.aggregate.rule import Vector
from medspark.federate.client import Answer

__all__ = ["SlackConfig", "slack_counts"]


class SlackConfig(Config):
    """SFAT's weights of the clients, in place of their numbers of images."""

    slack: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="favour (1 + slack) / (1 - slack) of the clients with the smallest adversarial "
        "loss; 1/6 is usual, 0 is off",
    )
    enhanced: int = Field(1, ge=1, description="number of clients that are favoured in a round")

    def counts(self, answers: Mapping[int, Answer]) -> dict[int, float]:
        """Return the weights of ``answers`` by client: their numbers of images without slack.

        A loss that is not a number counts as the largest, so that no broken client is favoured.
        """
        clients = sorted(answers)
        images = [float(answers[client].images) for client in clients]
        if self.slack == 0:
            return dict(zip(clients, images, strict=True))
        losses = np.nan_to_num([answers[client].loss for client in clients], nan=np.inf)
        weights = slack_counts(images, losses.tolist(), slack=self.slack, enhanced=self.enhanced)
        return dict(zip(clients, weights.tolist(), strict=True))


def slack_counts(
    counts: Sequence[float], losses: Sequence[float], *, slack: float = 1 / 6, enhanced: int = 1
) -> Vector:
    """Return the clients' weights, which replace their numbers of images and have the same sum.

    The ``enhanced`` clients with the smallest adversarial loss count (1 + slack) / (1 - slack)
    times as much, 1.4 by default. Ties go to the first.
    """
    favour = np.ones(len(counts))
    favour[np.argsort(losses, kind="stable")[:enhanced]] = (1 + slack) / (1 - slack)
    weighed = np.asarray(counts, dtype=np.float64) * favour
    scaled: Vector = weighed * (sum(counts) / weighed.sum())
    return scaled
