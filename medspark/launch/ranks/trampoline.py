"""The function that Spark ships to a rank: it makes medspark importable, then starts the rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["trampoline"]


def trampoline() -> Callable[[bytes, dict[str, Any]], None]:
    """Return a function that can be unpickled even if medspark is not installed.

    Packages of ``spark-submit --py-files`` can be imported in Spark's workers, but not in the
    torchrun processes below them. A nested function is pickled by value, so it needs no import.
    Its argument ``package`` is medspark as a zip file.
    """

    def start(package: bytes, order: dict[str, Any]) -> None:
        import os
        import sys
        import tempfile

        # TorchDistributor removes the folder of its script, and this file with it.
        beside = os.path.dirname(os.path.abspath(sys.argv[0]))
        number, path = tempfile.mkstemp(prefix="medspark-", suffix=".zip", dir=beside)
        with os.fdopen(number, "wb") as file:
            file.write(package)
        sys.path.insert(0, path)
        from medspark.launch.ranks.rank import main

        main(order)

    return start
