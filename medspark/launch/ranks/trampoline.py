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
        import io
        import os
        import sys
        import tempfile
        import zipfile

        # The folder of TorchDistributor's own script: it is removed with it.
        beside = os.path.dirname(os.path.abspath(sys.argv[0]))
        folder = tempfile.mkdtemp(prefix="medspark-", dir=beside)
        zipfile.ZipFile(io.BytesIO(package)).extractall(folder)
        sys.path.insert(0, folder)
        from medspark.launch.rank import main

        main(order)

    return start
