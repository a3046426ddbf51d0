"""Read small files that a stranger may have written, within limits of size and nesting.

A file that is too large, not a regular file or nested too deeply raises OSError or ValueError, with
a text that completes a sentence that begins with the file's name.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["open_regular", "parse_json", "read_regular"]

_MIB = 1 << 20


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises OSError for anything else of that name: a device, a folder or a pipe.
    """
    # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return open(handle, "rb")


def read_regular(path: Path, *, most: int = 16 * _MIB) -> bytes:
    """Return the content of a regular file of at most ``most`` bytes.

    Raises OSError for a larger file, and for anything that is not a regular file.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size <= most:
            content = file.read(most + 1)
            if len(content) <= most:  # the file may be growing
                return content
    raise OSError(errno.EFBIG, f"it is larger than {most} bytes", str(path))


def parse_json(content: bytes | str) -> Any:
    """Return the JSON document. Raises ValueError if it is not JSON, or nested too deeply."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
