"""The interface of an aggregation rule: up to four methods that never need all updates at once.

Updates are the rows of a matrix (n clients, d weights): trained weights minus the round's weights.
A rule states which measurements it ``needs``, and its caller

1. measures them, coordinate chunk by chunk (``measure.py``): norms, or all inner products;
2. calls ``weigh``, which maps n or n x n numbers to one weight per client;
3. calls ``combine`` on each chunk (n, c), which returns the outcome (c,) of these coordinates;
4. calls ``step`` on each chunk of the outcome: the server optimiser.

So the same rule runs in memory (``in_memory.py``) and on updates that do not fit into memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from medspark.config import Config
from medspark.errors import UsageError
from medspark.federate.aggregate.exact import weighted_sum

__all__ = ["Matrix", "Measured", "Needs", "Rule", "State", "Vector", "Weighing"]

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]
Needs = Literal["nothing", "norms", "products"]
# The state of a server optimiser: vectors (d,) by name.
State = Mapping[str, Vector]


@dataclass(frozen=True)
class Measured:
    """The measurements of all updates from which a rule weighs the clients.

    ``counts`` (n,) are the clients' numbers of images, ``squares`` (n,) the squared norms of their
    updates, and ``products`` (n + r, n + r) the inner products of the n updates and the r reference
    vectors that the rule names. Measurements that the rule does not need are empty. ``seed`` and
    ``round`` key every random choice.
    """

    clients: tuple[int, ...]
    counts: Vector
    squares: Vector
    products: Matrix
    seed: int = 0
    round: int = 0

    @property
    def norms(self) -> Vector:
        """The Euclidean norms (n,) of the updates."""
        norms: Vector = np.sqrt(self.squares)
        return norms

    @property
    def distances(self) -> Matrix:
        """The squared distances (n + r, n + r) between all updates and references."""
        squares = np.diagonal(self.products)
        apart = squares[:, None] + squares[None, :] - 2 * self.products
        np.fill_diagonal(apart, 0.0)
        distances: Matrix = np.maximum(apart, 0.0)
        return distances

    @property
    def cosines(self) -> Matrix:
        """The cosines (n + r, n + r) between all updates and references; 0 with a zero vector."""
        norms = np.sqrt(np.diagonal(self.products))
        scale = norms[:, None] * norms[None, :]
        cosines = np.divide(self.products, scale, out=np.zeros_like(scale), where=scale > 0)
        return np.clip(cosines, -1.0, 1.0)


@dataclass(frozen=True)
class Weighing:
    """The weights of the clients: the outcome is the sum of factor x update, over ``divisor``.

    ``references`` (r,) are the factors of the reference vectors. ``rejected`` (n,) marks the
    clients that a detecting rule rejects; it is None for other rules. ``noise`` is the standard
    deviation of the Gaussian noise added to each weight of the outcome.
    """

    factors: Vector
    divisor: float
    rejected: npt.NDArray[np.bool_] | None = None
    references: Vector | None = None
    noise: float = 0.0


class Rule(Config):
    """The base of all rules, which itself is FedAvg (McMahan et al. 2017).

    The outcome of FedAvg is the mean of the updates, weighted by the clients' numbers of images.
    """

    needs: ClassVar[Needs] = "nothing"
    # Reference vectors (d,) that ``products`` also holds, after the clients, by name.
    references: ClassVar[tuple[str, ...]] = ()
    # Whether ``products`` are of each client's sum of all updates so far, not of its last update.
    remembers: ClassVar[bool] = False
    # Whether the outcome is a weighted sum in which each factor depends on its own client alone.
    # Then the tasks that train the clients can add up the updates.
    separable: ClassVar[bool] = False

    @property
    def least(self) -> int:
        """The fewest clients for which the rule is defined."""
        return 1

    def check_round(self, clients: int) -> None:
        """Raise UsageError if rounds of ``clients`` clients are too small for the settings."""
        if clients < self.least:
            raise UsageError(
                f"{type(self).__name__} needs at least {self.least} clients in a round with these "
                f"settings, and a round has {clients}."
            )

    def check(self, clients: int) -> None:
        """Raise UsageError if ``clients`` usable updates are too few for the settings."""
        if clients < self.least:
            raise UsageError(
                f"{type(self).__name__} needs at least {self.least} clients with these settings, "
                f"but only {clients} sent a usable update."
            )

    def weigh(self, seen: Measured) -> Weighing:
        """Return the weight of each client."""
        return Weighing(seen.counts, float(seen.counts.sum()))

    def combine(self, block: Matrix, weighing: Weighing, references: Matrix) -> Vector:
        """Return the outcome (c,) of one chunk of updates (n, c) and references (r, c)."""
        factors = weighing.factors
        if weighing.references is not None:
            block = np.concatenate([block, references])
            factors = np.concatenate([factors, weighing.references])
        return weighted_sum(block, factors) / weighing.divisor

    def step(self, change: Vector, state: State) -> tuple[Vector, State]:
        """Return the change (c,) of the weights and the next state; the first ``state`` is {}."""
        return change, state
