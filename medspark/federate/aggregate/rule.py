"""What an aggregation rule is: up to four verbs, each of which sees little enough for its place.

Updates are the rows of a matrix (n clients, d weights): trained weights minus the round's weights.
A rule never needs that matrix whole. It states what it ``needs``, and whoever calls it

1. measures that, coordinate chunk by chunk (``measure.py``): norms, or all inner products;
2. has the rule ``weigh`` the clients, which takes n numbers or n x n, never d;
3. has it ``combine`` each chunk (n, c) into (c,): the weighted sum, or a function of coordinates;
4. has it ``step`` each chunk of the outcome: what a server optimiser with a memory does.

So the same rule runs in memory (``in_memory.py``) and on files that no machine could hold.
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
# What a server optimiser remembers: one number of each kind for every weight.
State = Mapping[str, Vector]


@dataclass(frozen=True)
class Measured:
    """What a rule may know of all updates when it weighs the clients.

    ``counts`` (n,) are the clients' images; ``squares`` (n,) their updates' squared norms;
    ``products`` (n + r, n + r) the inner products of the n updates and the r reference vectors that
    the rule names. What the rule does not need is empty. ``seed`` and ``round`` key every choice.
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
        """The squared distances of all updates and references from one another."""
        squares = np.diagonal(self.products)
        apart = squares[:, None] + squares[None, :] - 2 * self.products
        np.fill_diagonal(apart, 0.0)
        distances: Matrix = np.maximum(apart, 0.0)
        return distances

    @property
    def cosines(self) -> Matrix:
        """The cosines of all updates and references with one another; 0 with a zero vector."""
        norms = np.sqrt(np.diagonal(self.products))
        scale = norms[:, None] * norms[None, :]
        cosines = np.divide(self.products, scale, out=np.zeros_like(scale), where=scale > 0)
        return np.clip(cosines, -1.0, 1.0)


@dataclass(frozen=True)
class Weighing:
    """How much each client counts: the outcome is the sum of factor x update, over ``divisor``.

    ``references`` (r,) are the factors of the reference vectors. ``rejected`` (n,) is what a rule
    that detects has found, None where a rule does not detect. ``noise`` is the standard deviation
    of the Gaussian noise that every weight of the outcome gets.
    """

    factors: Vector
    divisor: float
    rejected: npt.NDArray[np.bool_] | None = None
    references: Vector | None = None
    noise: float = 0.0


class Rule(Config):
    """How the updates of a round become one change of the weights; this one is their mean.

    The mean is weighted by the clients' images (FedAvg, McMahan et al. 2017).
    """

    needs: ClassVar[Needs] = "nothing"
    # Reference vectors (d,) that ``products`` also holds, after the clients, by name.
    references: ClassVar[tuple[str, ...]] = ()
    # Whether ``products`` are those of all that a client has ever sent, summed up.
    remembers: ClassVar[bool] = False
    # Whether the outcome is the weighted sum, and each factor follows from its own client alone:
    # then updates can be added up where they are made.
    separable: ClassVar[bool] = False

    @property
    def least(self) -> int:
        """The fewest clients for which the rule is defined."""
        return 1

    def check(self, clients: int) -> None:
        """Raise UsageError where ``clients`` are too few for the rule's settings."""
        if clients < self.least:
            raise UsageError(
                f"{type(self).__name__} needs at least {self.least} clients with these settings, "
                f"and {clients} sent an update that can be used."
            )

    def weigh(self, seen: Measured) -> Weighing:
        """Return how much each client counts."""
        return Weighing(seen.counts, float(seen.counts.sum()))

    def combine(self, block: Matrix, weighing: Weighing, references: Matrix) -> Vector:
        """Return the outcome (c,) for some coordinates, given updates (n, c), references (r, c)."""
        factors = weighing.factors
        if weighing.references is not None:
            block = np.concatenate([block, references])
            factors = np.concatenate([factors, weighing.references])
        return weighted_sum(block, factors) / weighing.divisor

    def step(self, change: Vector, state: State) -> tuple[Vector, State]:
        """Return what to add to the weights, and what to remember; ``state`` is {} at first."""
        return change, state
