"""Classes of processors that compute differently, and from which sizes on a kernel pays on each.

amx           tiles for products of bf16 matrices (Intel, from Sapphire Rapids on)
avx512_bf16   products of bf16 numbers in vectors (AMD from Zen 4 on, Intel's Cooper Lake)
plain         neither: passes in bf16 are slower than in float32
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

__all__ = ["Processor", "Thresholds", "processor", "thresholds"]

Processor = Literal["amx", "avx512_bf16", "plain"]


@dataclass(frozen=True)
class Thresholds:
    """Sizes up to which, or from which on, a kernel is faster than oneDNN's.

    A convolution is a matrix product from ``pointwise`` (1 x 1) or ``window`` weights per position
    on; a 3 x 3 layer must first copy its input nine times. A depthwise layer pads its images itself
    above ``padding`` positions. A dense layer's gradients are products up to ``unfolding``
    positions per batch.
    """

    pointwise: int
    window: int
    padding: int
    unfolding: int


# Measured with AMX. With AVX-512 bf16 no other value is faster beyond noise for DenseNet121, 64 px
# (tests/benchmarks/thresholds.py). Nothing else has been measured.
_WITH_AMX = Thresholds(pointwise=16, window=1000, padding=4, unfolding=4096)
_THRESHOLDS: dict[Processor, Thresholds] = {
    "amx": _WITH_AMX,
    "avx512_bf16": _WITH_AMX,
    "plain": _WITH_AMX,
}


@functools.cache
def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Processor:
    """Return the class of this machine's processor; the flags of ``cpuinfo`` tell bf16 vectors."""
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    try:
        flags = set(re.findall(r"\w+", cpuinfo.read_text(encoding="utf-8", errors="replace")))
    except OSError:  # not Linux
        return "plain"
    return "avx512_bf16" if "avx512_bf16" in flags else "plain"


def thresholds() -> Thresholds:
    """Return the thresholds of this machine's processor."""
    return _THRESHOLDS[processor()]
