"""Key files for tests that call a job: random enough for the checks, and reproducible."""

from __future__ import annotations

import hashlib
from pathlib import Path


def write_key(path: Path, seed: str) -> Path:
    """Write the key of ``seed`` to ``path``, readable by its owner only, and return ``path``."""
    path.touch(0o600)
    path.write_text(hashlib.sha256(seed.encode()).hexdigest(), encoding="ascii")
    return path
