"""Run the benchmarks: ours and the reference by turns, in one process, medians of several.

    make bench                  all of them, into build/bench.json
    make bench ONLY=loader      those whose name begins so

Each module beside this one has ``BENCHMARKS``: names, and functions that return one ``Result``.
The machine should be idle: two heavy torch processes at once slow each other tenfold.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "cluster"))
sys.path.insert(0, str(HERE.parent / "shards"))
sys.path.insert(0, str(HERE))

from timing import Result  # noqa: E402 - beside this file, which is a script


def discover() -> dict[str, Callable[[], Result]]:
    """Return every benchmark by its name."""
    found: dict[str, Callable[[], Result]] = {}
    for path in sorted(HERE.glob("*.py")):
        if path.stem not in ("run", "timing") and not path.stem.startswith("test_"):
            found |= getattr(importlib.import_module(path.stem), "BENCHMARKS", {})
    return found


def main() -> int:
    """Run what is asked for and add it to the output file, which keeps the others' results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run those whose name begins with this")
    parser.add_argument("--output", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    chosen = {name: run for name, run in discover().items() if name.startswith(args.only)}
    if args.list:
        print("\n".join(chosen))
        return 0
    if not chosen:
        print(f"There is no benchmark whose name begins with {args.only}; try --list.")
        return 2
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(args.output.read_text()) if args.output.exists() else []
    for name, run in chosen.items():
        row = run().row(name, command=f"make bench ONLY={name}")
        rows = [other for other in rows if other["name"] != name] + [row]
        args.output.write_text(json.dumps(rows, indent=1) + "\n")
        verdict = "reached" if row["reached"] else "NOT reached"
        print(
            f"{name:40} {row['ratio']:8.3f} [{row['low']:.3f}, {row['high']:.3f}] "
            f"goal {row['goal']} {verdict}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
