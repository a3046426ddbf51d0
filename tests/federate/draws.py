"""Hypothesis strategies for aggregation: updates of clients that roughly agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

Array = npt.NDArray[Any]

seeds = st.integers(0, 2**32 - 1)


def honest(seed: int, clients: int, length: int = 6, *, spread: float = 0.1) -> Array:
    """Return updates (n, d) around one direction, as float32."""
    draw = np.random.default_rng(seed)
    towards = draw.normal(size=length)
    return (towards + spread * draw.normal(size=(clients, length))).astype(np.float32)
