"""Write files atomically, and hash files and settings."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["DRAFT", "json_digest", "replacing", "sha256_of", "write_whole"]

# What follows the name of a file in the name of its draft, as a regular expression.
DRAFT = r"\.[0-9a-f]{8}\.partial"


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield the path of a draft beside ``path``, which replaces ``path`` if the block succeeds.

    A ``durable`` draft is synced to disk (fsync) before the rename. If the block raises, ``path``
    is unchanged and the draft is removed.
    """
    # Processes of two machines can have one number, and write to one folder.
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield draft
        if durable:
            with open(draft, "rb") as file:
                os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, text: str, *, durable: bool = False) -> None:
    """Write ``text`` atomically: a reader sees the whole old file or the whole new one."""
    with replacing(path, durable=durable) as draft:
        draft.write_text(text, encoding="utf-8")


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(values: Any) -> str:
    """Return the SHA-256 of ``values`` as JSON with sorted keys, in hexadecimal."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
