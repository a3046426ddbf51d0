"""Detect the processor's instructions for 8-bit numbers, which decide the formats to try."""

from __future__ import annotations

import platform
import re
from pathlib import Path

__all__ = ["dot_product"]

# Flags of /proc/cpuinfo whose instructions add 8-bit products in 32 bits. Without them, x86 adds
# pairs in 16 bits, which saturate.
_DOT_PRODUCTS = ("amx_int8", "avx512_vnni", "avx_vnni", "asimddp", "i8mm")


def dot_product(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the instruction set for sums of 8-bit products, "" if there is none or none is known.

    Every ARM processor of 64 bits adds in 32 bits.
    """
    try:
        flags = set(re.findall(r"\w+", cpuinfo.read_text(encoding="utf-8", errors="replace")))
    except OSError:
        flags = set()
    found = next((flag for flag in _DOT_PRODUCTS if flag in flags), "")
    return found or ("neon" if platform.machine() in ("aarch64", "arm64") else "")
