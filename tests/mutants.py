"""Plant known mistakes, one at a time, and check that a test fails for each of them.

Reads   tests/mutants/*.toml: what to change where, and the tests that must fail for it
Writes  a line per mutant; the exit status is 0 only if every one of them was noticed

    python tests/mutants.py                       all of them, in a copy of the checkout
    python tests/mutants.py --only settle,fold    those whose name holds one of the words
    python tests/mutants.py --jobs 4              four at a time, each in a copy of its own

The tests have to pass before a mistake is planted: where they do not, nothing is (status 2).
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = ROOT / "tests" / "mutants"

_COPIED = (
    "medspark", "jobs", "notebooks", "conf", "tests", "pyproject.toml", "README.md", "Makefile",
)  # fmt: skip
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


def survivors(mutants: Sequence[Mutant], roots: Sequence[Path]) -> Iterator[str]:
    """Plant each mutant in one of the copies and undo it; yield those for which no test failed."""
    free: SimpleQueue[Path] = SimpleQueue()
    for root in roots:
        free.put(root)

    def tried(mutant: Mutant) -> tuple[int, str, float]:
        root = free.get()
        try:
            return _try(mutant, root)
        finally:
            free.put(root)

    with ThreadPoolExecutor(len(roots)) as pool:
        results = zip(mutants, pool.map(tried, mutants), strict=True)
        for number, (mutant, (status, output, took)) in enumerate(results, 1):
            noticed = status == _TESTS_FAILED
            verdict = "noticed" if noticed else f"NOT NOTICED (pytest's status {status})"
            print(f"{number}/{len(mutants)} {mutant.name}: {verdict}, {took:.0f} s", flush=True)
            if not noticed:
                print(output[-2000:], flush=True)
                yield mutant.name


def _try(mutant: Mutant, root: Path) -> tuple[int, str, float]:
    """Return how the mutant's tests end with the mistake in place, what they say, and seconds."""
    began = time.monotonic()
    text = mutant.plant(root)
    try:
        status, output = _run(root, mutant.tests)
    finally:
        (root / mutant.file).write_text(text, encoding="utf-8")
    return status, output, time.monotonic() - began


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


def _copy(root: Path) -> Path:
    root.mkdir()
    for name in _COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, root / name)
    return root


def main(argv: Sequence[str]) -> int:
    """Run the mutants that ``argv`` selects; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="parts of names, between commas")
    parser.add_argument("--jobs", type=int, default=1, help="mutants that are tried at a time")
    asked = parser.parse_args(argv)
    words = [word for word in asked.only.split(",") if word]
    mutants = [m for m in read_mutants() if not words or any(word in m.name for word in words)]
    if not mutants:
        parser.error(f"no mutant's name holds one of {asked.only}")
    with tempfile.TemporaryDirectory(prefix="medspark-mutants-") as folder:
        roots = [_copy(Path(folder) / f"{number}") for number in range(max(1, asked.jobs))]
        status, output = _run(roots[0], sorted({test for m in mutants for test in m.tests}))
        if status != 0:
            print(f"{output[-2000:]}\nThe tests do not pass as they are: no mistake is planted.")
            return 2
        missed = list(survivors(mutants, roots))
    print(f"{len(mutants) - len(missed)} of {len(mutants)} mutants noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
