"""Rules that no linter knows: prints, broad excepts, docstrings, and the length of a file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "medspark"
REASON = re.compile(r"# (noqa: BLE001 - )?(?!noqa)\w")
BROAD = {"Exception", "BaseException"}


def modules() -> Iterator[Path]:
    return (path for path in sorted(PACKAGE.rglob("*.py")))


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def prints(source: str) -> bool:
    """Return whether ``source`` prints although nobody runs it as a command."""
    command = '__name__ == "__main__"' in source
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return not command and any(
        isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls
    )


def unreasoned(source: str) -> list[int]:
    """Return the lines of ``source`` that catch everything and do not say why."""
    lines = source.splitlines()
    handlers = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ExceptHandler))
    return [
        handler.lineno
        for handler in handlers
        if handler.type is None or (isinstance(handler.type, ast.Name) and handler.type.id in BROAD)
        if not REASON.search(lines[handler.lineno - 1])
    ]


def test_only_jobs_and_commands_print():
    found = {name(path) for path in modules() if prints(path.read_text("utf-8"))}

    printing = {path for path in found if not path.startswith("jobs/")}
    assert printing <= {"job.py"}  # which every job runs through


def test_who_catches_everything_says_why():
    found = {name(path): unreasoned(path.read_text("utf-8")) for path in modules()}

    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("line", "accepted"),
    [
        ("except Exception:", False),
        ("except:", False),
        ("except BaseException as e:  # noqa: BLE001", False),
        ("except Exception as e:  # noqa: BLE001 - the edge", True),
        ("except Exception:  # the disk", True),
        ("except ValueError:", True),
    ],
)
def test_a_comment_is_a_reason(line: str, accepted: bool):
    assert (unreasoned(f"try:\n    f()\n{line}\n    raise\n") == []) is accepted


BEST = re.compile(r"\baxes\.legend\((?!.*\bloc=)")


def test_no_figure_looks_for_the_best_place_of_its_legend():
    """matplotlib warns where the search takes a second, and how long it takes is the machine's."""
    searching = {name(path) for path in modules() if BEST.search(path.read_text("utf-8"))}

    assert searching == set()


def public(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Yield the public functions and classes, and the public methods of these classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node)


def test_what_is_public_has_a_docstring():
    trees = [ast.parse(path.read_text("utf-8")) for path in modules()]
    documented = [ast.get_docstring(node) is not None for tree in trees for node in public(tree)]

    assert sum(documented) >= 0.95 * len(documented)


def test_no_file_is_longer_than_400_lines():
    folders = ("medspark", "jobs", "notebooks", "tests")
    paths = [path for folder in folders for path in (PACKAGE.parent / folder).rglob("*.py")]

    assert [path for path in paths if len(path.read_text("utf-8").splitlines()) > 400] == []
