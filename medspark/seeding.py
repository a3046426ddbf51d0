"""Keyed randomness: a random number depends on its purpose, not on who draws it or in what order.

Every random choice in training (shuffle, flips, attack noise) is a hash of (seed, purpose, index).
So it is the same for any number of ranks, workers and restarts.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def derive(seed: int, *names: str | int) -> int:
    """Return a 64-bit key for the purpose that ``names`` describe, the same on every machine."""
    spelled = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(spelled.encode(), digest_size=8).digest(), "little")


def hash64(key: int, index: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """Return 64 well-mixed bits per entry of ``index`` (SplitMix64; Steele et al. 2014)."""
    z = np.asarray(index).astype(np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is what the hash is made of
        z = np.uint64(key) + (z + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
    mixed: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


def uniform(key: int, index: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return one float in [0, 1) per entry of ``index``."""
    return (hash64(key, index) >> np.uint64(11)).astype(np.float64) * 2.0**-53
