"""Read YAML that a stranger may have written, within limits of depth and size.

It is apart from ``medspark.documents``, so that a device that predicts needs no YAML library.
"""

from __future__ import annotations

from typing import Any

import yaml

__all__ = ["parse_yaml"]

# Deeper than any configuration, and far below Python's recursion limit.
_DEEPEST, _MOST_NODES = 32, 100_000


def parse_yaml(content: bytes) -> Any:
    """Return the YAML document, loaded without running any code.

    Raises ValueError for text that is not UTF-8 or not YAML, for more than 32 levels, and for more
    than 100,000 values; an alias counts as many values as it repeats.
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
        raise ValueError(_problem(error)) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError):
        # PyYAML raises these for a tag that does not fit its value: !!int '', !!bool maybe.
        raise ValueError("a tag (!!) does not fit what follows it") from None


def _problem(error: yaml.MarkedYAMLError) -> str:
    """Return what is wrong and where, but not the line itself, which may hold a password."""
    mark = error.problem_mark or error.context_mark
    where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{error.problem or error.context}{where}"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Refuses documents that are deep, or large once their aliases are expanded."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._open = 0
        # Number of values and levels of every complete node.
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
