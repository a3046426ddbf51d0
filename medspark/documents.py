"""Small files that somebody else may have written: read within limits, and parsed without surprise.

What is too large, no regular file, too deep or too often repeated is an OSError or a ValueError
whose text is the rest of a sentence.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import yaml

__all__ = ["open_regular", "parse_json", "parse_yaml", "read_regular"]

_MIB = 1 << 20
# Deeper than any configuration, and far from where Python's own recursion ends.
_DEEPEST, _MOST_NODES = 32, 100_000


def open_regular(path: Path) -> BinaryIO:
    """Return a regular file, open for reading.

    Raises OSError for whatever else has that name: a device, a folder, or a pipe, which is not
    waited for.
    """
    # Opening a pipe that nobody writes to would wait for ever.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return open(handle, "rb")


def read_regular(path: Path, *, most: int = 16 * _MIB) -> bytes:
    """Return what a regular file of at most ``most`` bytes holds.

    Raises OSError for what is none and for a larger one.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size <= most:
            content = file.read(most + 1)
            if len(content) <= most:  # it may be growing
                return content
    raise OSError(errno.EFBIG, f"it is larger than {most} bytes", str(path))


def parse_json(content: bytes | str) -> Any:
    """Return the JSON document. Raises ValueError for what is none, or nested too deeply."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml(content: bytes) -> Any:
    """Return the YAML document, safely loaded.

    Raises ValueError for what is no UTF-8 or no YAML, for more than 32 levels, and for more than
    100,000 values, of which an alias counts as many as what it repeats.
    """
    try:
        loader = _Loader(content.decode())
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        raise ValueError(_told(error)) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError):
        # What PyYAML raises for a tag over something else: !!int '', !!bool maybe.
        raise ValueError("a tag (!!) does not fit what follows it") from None


def _told(error: yaml.MarkedYAMLError) -> str:
    """Return what is wrong and where; not the line itself, which may hold a password."""
    mark = error.problem_mark or error.context_mark
    where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{error.problem or error.context}{where}"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Refuses what is deep, or large once its aliases are written out."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._open = 0
        # Values and levels of every node that is complete.
        self._sizes: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        repeated = self.check_event(yaml.AliasEvent)
        self._open += 1
        if self._open > _DEEPEST:
            raise yaml.YAMLError(f"it has more than {_DEEPEST} levels")
        node = super().compose_node(parent, index)
        self._open -= 1
        if repeated and id(node) not in self._sizes:
            raise yaml.YAMLError("an alias stands inside what it repeats")
        if not repeated and node is not None:
            self._sizes[id(node)] = self._measure(node)
        return node

    def _measure(self, node: yaml.Node) -> tuple[int, int]:
        below = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            below = [each for pair in node.value for each in pair]
        sizes = [self._sizes[id(each)] for each in below]
        count = 1 + sum(count for count, _ in sizes)
        depth = 1 + max((depth for _, depth in sizes), default=0)
        if depth > _DEEPEST:
            raise yaml.YAMLError(f"it has more than {_DEEPEST} levels")
        if count > _MOST_NODES:
            raise yaml.YAMLError(f"it has more than {_MOST_NODES} values")
        return count, depth
