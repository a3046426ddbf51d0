"""The command ``medspark JOB …``, which does what ``spark-submit jobs/JOB.py …`` does.

    medspark train_at --shards SHARDS --model.name mobilenetv2_100
    medspark --help

It is for users who have the package and no clone. Spark starts inside this process, on
``--spark.master``; ``spark-submit`` is needed only for options of its own.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

from medspark import __version__, jobs
from medspark.job import DONE, MISUSED


def descriptions() -> dict[str, str]:
    """Return the first line of every job's documentation, by name; no job is imported."""
    (folder,) = map(Path, jobs.__path__)
    names = [module.name for module in pkgutil.iter_modules([str(folder)])]
    texts = {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in names}
    return {
        name: (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
        for name, text in texts.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the first word names, with the other words; return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    name, known = words[0] if words else "--help", descriptions()
    if name in ("-h", "--help"):
        width = max(map(len, known))
        lines = [f"  {job:<{width}}  {line}" for job, line in known.items()]
        print(
            "usage: medspark JOB [--config FILE] [--profile FILE] [--KEY VALUE ...]", "", sep="\n"
        )
        print("jobs:", *lines, "", "medspark JOB --help lists the keys of a job.", sep="\n")
        return DONE
    if name == "--version":
        print(__version__)
        return DONE
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}."
        print(f"medspark: There is no job '{name}'; {hint}", file=sys.stderr)
        return MISUSED
    status: int = importlib.import_module(f"medspark.jobs.{name}").main(words[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())
