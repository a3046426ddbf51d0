"""Whether a secret key is one: long and random enough, and readable by its owner alone."""

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

# 128 bits, which nobody tries one by one (NIST SP 800-131A asks for 112).
KEY_BYTES = 16
# Of 16 random bytes fewer than 8 differ once in 10^12 keys.
_LEAST_VALUES = 8
# Text has 6 bits a character at most (base64), so fewer of them are no 128 bits.
_TEXT_CHARACTERS = 22
_MAKE = "make one with: install -m 600 <(openssl rand -hex 32) KEY"


def check_strength(key: bytes, name: str) -> None:
    """Raise UsageError where ``key`` can be guessed; ``name`` says which one it is.

    Too short, of few different bytes, a short block again and again, steps of one size (00 01 02),
    or text too short to hold 128 bits.
    """
    if len(key) < KEY_BYTES:
        raise UsageError(f"The key {name} should have at least {KEY_BYTES} bytes; {_MAKE}.")
    if _is_pattern(key) or _is_short_text(key):
        raise UsageError(f"The key {name} can be guessed; {_MAKE}.")


def _is_pattern(key: bytes) -> bool:
    steps = {(after - before) % 256 for before, after in itertools.pairwise(key)}
    return len(set(key)) < _LEAST_VALUES or len(steps) == 1 or _period(key) < KEY_BYTES


def _period(key: bytes) -> int:
    """Return the length of the shortest block that ``key`` repeats, its last time maybe cut."""
    return next(n for n in range(1, len(key) + 1) if key[n:] == key[: len(key) - n])


def _is_short_text(key: bytes) -> bool:
    text = key.decode("latin-1").strip()
    return text.isascii() and text.isprintable() and len(text) < _TEXT_CHARACTERS


def check_readers(path: Path) -> None:
    """Refuse a key file that others may read, where its permissions are ours to change.

    Raises UsageError there. Where they are not (a mounted secret, another owner's file, a file
    system without permissions), the log says it.
    """
    if not _others_may_read(path):
        return
    if _can_be_closed(path):
        raise UsageError(f"Others can read the key {path}: close it with chmod 600 {path}.")
    _LOGGER.warning("Others can read the key %s, and its permissions cannot be changed here", path)


def _others_may_read(path: Path) -> bool:
    return bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))


def _can_be_closed(path: Path) -> bool:
    """Return whether permissions can be changed: tried, for volumes and mounts only pretend it."""
    status = path.stat()
    if status.st_uid != os.geteuid():
        return False
    try:
        path.chmod(stat.S_IMODE(status.st_mode) & stat.S_IRWXU)
        return not _others_may_read(path)
    except OSError:
        return False
    finally:
        # Whether the key is closed, and so lost to whoever shares it, is the owner's to say.
        with contextlib.suppress(OSError):
            path.chmod(stat.S_IMODE(status.st_mode))
