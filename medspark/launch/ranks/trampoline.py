"""The function that Spark ships to a rank: it brings medspark along, then starts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["trampoline"]


def trampoline() -> Callable[[bytes, dict[str, Any]], None]:
    """Return a function that can be unpickled where medspark is not installed.

    What ``spark-submit --py-files`` ships is importable in Spark's workers but not in the
    torchrun processes below them. A function defined inside another is pickled by value, so it
    arrives there whole, with the package as a zip file for its argument.
    """

    def start(package: bytes, order: dict[str, Any]) -> None:
        import os
        import sys
        import tempfile

        # The folder of TorchDistributor's own script: it is removed with it.
        beside = os.path.dirname(os.path.abspath(sys.argv[0]))
        number, path = tempfile.mkstemp(prefix="medspark-", suffix=".zip", dir=beside)
        with os.fdopen(number, "wb") as file:
            file.write(package)
        sys.path.insert(0, path)
        from medspark.launch.ranks.rank import main

        main(order)

    return start
