"""FLAME: keep the tight majority, clip to the median norm, add noise (Nguyen et al. 2022).

The paper clusters with HDBSCAN: a cluster holds more than half of the clients, one neighbour is
enough, and a single cluster is allowed. With these settings HDBSCAN joins the closest pairs until
one group holds more than half of all clients; there cannot be two such groups.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from medspark.federate.aggregate.norm_clipping import clipped
from medspark.federate.aggregate.rule import Matrix, Measured, Needs, Rule, Weighing

__all__ = ["Flame", "tight_majority"]


class Flame(Rule):
    """The plain mean of the tight majority's updates, clipped to the median norm of all.

    The reference ``weights`` are the round's weights.
    """

    needs: ClassVar[Needs] = "products"
    references: ClassVar[tuple[str, ...]] = ("weights",)

    noise: float = Field(
        0.001, ge=0, description="standard deviation of the noise on a weight, in median norms"
    )
    angles: Literal["models", "updates"] = Field(
        "models", description="vectors whose angles are compared; the paper compares models"
    )

    def weigh(self, seen: Measured) -> Weighing:
        """Return the clipping factors of the tight majority, 0 for other clients."""
        admitted = tight_majority(1 - self._cosines(seen))
        bound = float(np.median(seen.norms))
        return Weighing(
            admitted * clipped(seen.norms, bound),
            float(admitted.sum()),
            rejected=~admitted,
            noise=self.noise * bound,
        )

    def _cosines(self, seen: Measured) -> Matrix:
        clients = len(seen.clients)
        if self.angles == "models":
            # A model is the sum of an update and the round's weights.
            sums = np.hstack([np.eye(clients), np.ones((clients, 1))])
            seen = replace(seen, products=sums @ seen.products @ sums.T)
        return seen.cosines[:clients, :clients]


def tight_majority(distances: Matrix) -> npt.NDArray[np.bool_]:
    """Return the members (n,) of the first group of more than half, joining the closest pairs."""
    clients = len(distances)
    rows, columns = np.triu_indices(clients, 1)
    apart = distances[rows, columns]
    group = np.arange(clients)
    reach = np.inf
    for pair in np.argsort(apart, kind="stable"):
        if apart[pair] > reach:
            break
        group[group == group[columns[pair]]] = group[rows[pair]]
        if np.bincount(group).max() > clients // 2:
            # Pairs at the same distance join too.
            reach = min(reach, apart[pair])
    admitted: npt.NDArray[np.bool_] = group == np.bincount(group).argmax()
    return admitted
