"""Check that a secret key is long and random enough, and readable by its owner only."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import stat
from pathlib import Path

from medspark.errors import UsageError

__all__ = ["KEY_BYTES", "check_readers", "check_strength"]

_LOGGER = logging.getLogger(__name__)

# 128 bits are beyond brute force (NIST SP 800-131A requires 112).
KEY_BYTES = 16
# 16 random bytes have fewer than 8 different values once in 10^12 keys.
_LEAST_VALUES = 8
# Text holds at most 6 bits per character (base64), so shorter text has fewer than 128 bits.
_TEXT_CHARACTERS = 22
_MAKE = "make one with: install -m 600 <(openssl rand -hex 32) KEY"


def check_strength(key: bytes, name: str) -> None:
    """Raise UsageError if ``key`` can be guessed; ``name`` identifies it in the message.

    A key can be guessed if it is too short, has few different bytes, repeats a short block, counts
    in equal steps (00 01 02), or is text too short for 128 bits.
    """
    if len(key) < KEY_BYTES:
        raise UsageError(f"The key {name} should have at least {KEY_BYTES} bytes; {_MAKE}.")
    if _is_pattern(key) or _is_short_text(key):
        raise UsageError(f"The key {name} can be guessed; {_MAKE}.")


def _is_pattern(key: bytes) -> bool:
    steps = {(after - before) % 256 for before, after in itertools.pairwise(key)}
    return len(set(key)) < _LEAST_VALUES or len(steps) == 1 or _period(key) < KEY_BYTES


def _period(key: bytes) -> int:
    """Return the length of the shortest block that ``key`` repeats; the last copy may be cut."""
    return next(n for n in range(1, len(key) + 1) if key[n:] == key[: len(key) - n])


def _is_short_text(key: bytes) -> bool:
    text = key.decode("latin-1").strip()
    return text.isascii() and text.isprintable() and len(text) < _TEXT_CHARACTERS


def check_readers(path: Path) -> None:
    """Refuse a key file that others may read.

    Raises UsageError if this user can change its permissions. Otherwise (a mounted secret, another
    owner's file, a file system without permissions) it logs a warning.
    """
    if not _others_may_read(path):
        return
    if _can_be_closed(path):
        raise UsageError(f"Others can read the key {path}: close it with chmod 600 {path}.")
    _LOGGER.warning("Others can read the key %s, and its permissions cannot be changed here", path)


def _others_may_read(path: Path) -> bool:
    return bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))


def _can_be_closed(path: Path) -> bool:
    """Return whether permissions can be changed. It tries, since some mounts only pretend to."""
    status = path.stat()
    if status.st_uid != os.geteuid():
        return False
    try:
        path.chmod(stat.S_IMODE(status.st_mode) & stat.S_IRWXU)
        return not _others_may_read(path)
    except OSError:
        return False
    finally:
        # Restore the permissions: the owner decides whether to exclude others.
        with contextlib.suppress(OSError):
            path.chmod(stat.S_IMODE(status.st_mode))
