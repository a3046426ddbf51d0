"""Select the cohort of a federated round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medspark.seeding import derive, hash64

__all__ = ["cohort"]


def cohort(clients: Sequence[int], per_round: int, *, seed: int, round: int) -> list[int]:
    """Return the ``per_round`` clients of a round, sorted; all clients if there are fewer.

    Every client draws a number from (seed, round); the smallest numbers are selected. So the order
    of two clients does not depend on the other clients.
    """
    numbers = np.array(sorted(clients), dtype=np.int64)
    drawn = hash64(derive(seed, "round", round), numbers)
    return sorted(numbers[np.argsort(drawn, kind="stable")[:per_round]].tolist())
