"""Plant known mistakes, one at a time, and see that a test notices each of them.

Reads   tests/mutants/*.toml: what to change where, and the tests that must fail for it
Writes  a line per mutant; the exit status is 0 only if every one of them was noticed

    python tests/mutants.py                       all of them, in a copy of the checkout
    python tests/mutants.py --only settle,fold    those whose name holds one of the words
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = ROOT / "tests" / "mutants"

_COPIED = (
    "medspark",
    "jobs",
    "notebooks",
    "conf",
    "tests",
    "pyproject.toml",
    "README.md",
    "Makefile",
)
_LIMIT_SECONDS = 900
_TESTS_FAILED = 1  # pytest's exit status; any other one says nothing about the mutant


@dataclass(frozen=True)
class Mutant:
    """One planted mistake: in ``file``, the only occurrence of ``before`` becomes ``after``."""

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def plant(self, root: Path) -> str:
        """Change the file below ``root``; return what it held. Raises ValueError if it moved on."""
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.before) != 1:
            times = text.count(self.before)
            raise ValueError(f"{self.name}: {self.file} holds the text to change {times} times")
        path.write_text(text.replace(self.before, self.after), encoding="utf-8")
        return text


def read_mutants(folder: Path = MUTANTS) -> list[Mutant]:
    """Return every mutant of the files in ``folder``, in their order."""
    return [
        Mutant(
            name=f"{path.stem}/{entry['name']}",
            file=entry["file"],
            before=entry["before"],
            after=entry["after"],
            tests=tuple(entry["tests"]),
        )
        for path in sorted(folder.glob("*.toml"))
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    ]


def survivors(mutants: Sequence[Mutant], root: Path) -> Iterator[str]:
    """Plant each mutant below ``root`` and take it back; yield those that no test noticed."""
    for number, mutant in enumerate(mutants, 1):
        began = time.monotonic()
        text = mutant.plant(root)
        try:
            status, output = _run(root, mutant.tests)
        finally:
            (root / mutant.file).write_text(text, encoding="utf-8")
        noticed = status == _TESTS_FAILED
        verdict = "noticed" if noticed else f"NOT NOTICED (pytest's status {status})"
        took = time.monotonic() - began
        print(f"{number}/{len(mutants)} {mutant.name}: {verdict}, {took:.0f} s", flush=True)
        if not noticed:
            print(output[-2000:], flush=True)
            yield mutant.name


def _run(root: Path, tests: Sequence[str]) -> tuple[int, str]:
    environment = dict(os.environ, PYTHONPATH=str(root), PYTHONDONTWRITEBYTECODE="1")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True,
            timeout=_LIMIT_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return -1, f"no end within {_LIMIT_SECONDS} s"
    return done.returncode, done.stdout + done.stderr


def main(argv: Sequence[str]) -> int:
    """Run the mutants that ``argv`` asks for; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="parts of names, between commas")
    words = [word for word in parser.parse_args(argv).only.split(",") if word]
    mutants = [m for m in read_mutants() if not words or any(word in m.name for word in words)]
    with tempfile.TemporaryDirectory(prefix="medspark-mutants-") as folder:
        root = Path(folder) / "medspark"
        root.mkdir()
        for name in _COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, root / name)
        missed = list(survivors(mutants, root))
    print(f"{len(mutants) - len(missed)} of {len(mutants)} mutants noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
