"""User-level differential privacy: draw the cohort, configure the noise, compute epsilon.

Each client takes part in a round with an independent probability (Poisson sampling). Its update is
clipped, and the sum gets Gaussian noise (``aggregate/dp_fedavg.py``). So the networks of all rounds
reveal whether a client took part only up to (epsilon, delta). The seed determines cohorts and
noise; a real federation must keep it secret.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from medspark.config import Config
from medspark.errors import UsageError
from medspark.federate.aggregate.dp_fedavg import DPFedAvg
from medspark.seeding import derive, uniform

__all__ = ["PrivacyConfig", "check_privacy", "epsilon"]


class PrivacyConfig(Config):
    """The noise, clipping bound and sampling rate of a private federation."""

    multiplier: float = Field(
        1.0, gt=0, description="standard deviation of the noise on the sum, in bounds (z)"
    )
    bound: float = Field(1.0, gt=0, description="largest Euclidean norm of an update")
    rate: float = Field(
        0.1, gt=0, le=1, description="probability that a client takes part in a round"
    )
    delta: float | None = Field(
        None, gt=0, lt=1, description="delta of (epsilon, delta); clients ** -1.1 by default"
    )

    def cohort(self, clients: Sequence[int], *, seed: int, round: int) -> list[int]:
        """Return the sorted clients of a round, each drawn independently with ``rate``."""
        coins = uniform(derive(seed, "cohort", round), np.array(clients, dtype=np.int64))
        return sorted(int(c) for c, coin in zip(clients, coins, strict=True) if coin < self.rate)

    def rule(self, clients: int) -> DPFedAvg:
        """Return the aggregation rule for a federation of ``clients`` clients."""
        expected = self.rate * clients
        return DPFedAvg(bound=self.bound, multiplier=self.multiplier, expected=expected)

    def epsilon(self, clients: int, rounds: int) -> float:
        """Return the epsilon of ``rounds`` rounds for the configured delta."""
        delta = clients**-1.1 if self.delta is None else self.delta
        return epsilon(self.rate, self.multiplier, rounds, delta)


def epsilon(rate: float, multiplier: float, rounds: int, delta: float) -> float:
    """Return epsilon after ``rounds`` Poisson-sampled Gaussian sums, by Renyi accounting.

    Neighbours differ by one client (Mironov, Talwar and Zhang 2019). Raises UsageError if
    dp-accounting is not installed.
    """
    if rounds == 0:
        return 0.0
    events, rdp = _accounting()
    accountant = rdp.RdpAccountant()
    event = events.PoissonSampledDpEvent(rate, events.GaussianDpEvent(multiplier))
    accountant.compose(event, rounds)
    return float(accountant.get_epsilon(delta))


def check_privacy() -> None:
    """Raise UsageError if dp-accounting is not installed; call it before the first round."""
    _accounting()


def _accounting() -> tuple[Any, Any]:
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError:
        raise UsageError(
            "Privacy needs the package dp-accounting: pip install medspark[privacy]."
        ) from None
    return dp_accounting, rdp
