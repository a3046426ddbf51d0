"""Write the READMEs' figures from the records, or measure a record again.

Reads   tests/claims/*.json
Writes  the blocks of every README; or, for `again`, a line per figure

    python tests/claims/measure.py readme
    python tests/claims/measure.py again --only pgd        with SHARDS, WEIGHTS … in the environment
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import reduce
from operator import getitem
from typing import Any

from records import READMES, ROOT, Figure, Record, filled, read_records

_MEANS: dict[str, Callable[[list[Any]], float]] = {
    "mean": statistics.fmean, "median": statistics.median
}  # fmt: skip
_STEP = re.compile(r"(?P<key>\w+)|\[(?P<wanted>[^\]]+)\]")


def write_readmes() -> int:
    """Write every block of every README; return the exit status."""
    records = read_records()
    for path in READMES:
        before = path.read_text(encoding="utf-8")
        after = filled(before, records)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"written: {path.relative_to(ROOT)}")
    return 0


def measure_again(word: str) -> int:
    """Run the records whose name holds ``word``; return 0 if all are within what is recorded."""
    chosen = {name: record for name, record in read_records().items() if word in name}
    return int(sum(_outside(name, record) for name, record in chosen.items()) > 0)


def _outside(name: str, record: Record) -> int:
    """Run one record's commands; return how many figures are not within their interval."""
    if not record.result:
        print(f"{name}: its commands print the figures; compare by eye: {record.commands[-1]}")
        return 0
    figures = {key: figure for key, figure in record.figures.items() if figure.path}
    own = [figure.command for figure in figures.values() if figure.command]
    for command in dict.fromkeys([*([] if own else record.commands), *own]):
        print(f"{name}: {command}", flush=True)
        subprocess.run(["bash", "-euc", command], cwd=ROOT, check=True)
    document = json.loads((ROOT / record.result).read_text(encoding="utf-8"))
    missed = 0
    for key, figure in figures.items():
        again = look_up(document, figure.path)
        inside = is_within(again, figure)
        missed += not inside
        print(f"{name} {key}: {again:g}, recorded {figure}: {'within' if inside else 'NOT'}")
    return missed


def is_within(again: float, figure: Figure) -> bool:
    """Return whether a figure measured again is within what was recorded.

    That is the interval, to the digits shown, else two standard deviations, else half of the last
    digit shown.
    """
    if figure.low is not None and figure.high is not None:
        return figure.low <= round(again, figure.digits) <= figure.high
    half = 0.5 * 10.0**-figure.digits if figure.sd is None else 2 * figure.sd
    return figure.value - half <= again <= figure.value + half


def look_up(document: Any, path: str) -> float:
    """Return the figure that ``document`` has at ``path``.

    A path is made of keys and, for lists, ``[name=value,…]`` of the entries, where a name may be
    dotted and a number may be written as 2/255. It begins with ``mean`` or ``median`` if several
    entries fit; otherwise the first one counts. It ends with `` %`` for a share that is shown in
    percent.
    """
    steps, percent, _ = path.partition(" %")
    how, _, rest = steps.partition(" ")
    found = [document]
    for step in _STEP.finditer(rest if how in _MEANS else steps):
        if step["key"]:
            found = [part[step["key"]] for part in found]
        else:
            wanted = [pair.split("=") for pair in step["wanted"].split(",")]
            found = [entry for part in found for entry in part if _fits(entry, wanted)]
    value = _MEANS[how](found) if how in _MEANS else found[0]
    return float(value) * (100 if percent else 1)


def _fits(entry: Any, wanted: Sequence[Sequence[str]]) -> bool:
    return all(_is(reduce(getitem, name.split("."), entry), value) for name, value in wanted)


def _is(found: Any, wanted: str) -> bool:
    number = isinstance(found, int | float)
    return bool(found == (float(Fraction(wanted)) if number else wanted))


def main(argv: Sequence[str]) -> int:
    """Do what ``argv`` asks for; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("readme", "again"))
    parser.add_argument("--only", default="", help="a part of the records' names")
    options = parser.parse_args(argv)
    return write_readmes() if options.what == "readme" else measure_again(options.only)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
