"""Show the progress of a Spark job that leaves a file for each finished part of its work."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

__all__ = ["followed"]


@contextmanager
def followed(done: Callable[[], int], *, total: int, unit: str, doing: str) -> Iterator[None]:
    """Show a progress bar of ``done()`` out of ``total`` while the block runs.

    ``done`` is called every second, so it must be cheap. The bar is labelled ``doing``, counts in
    ``unit`` and estimates the time that is left. In a log, where it cannot be drawn over, it is
    written once a minute at most.
    """
    stop = threading.Event()
    pace = {} if sys.stderr.isatty() else {"mininterval": 60.0, "maxinterval": 60.0}
    with tqdm(total=total, initial=done(), unit=unit, desc=doing, **pace) as bar:

        def advance() -> None:
            bar.update(max(done() - bar.n, 0))

        def follow() -> None:
            while not stop.wait(1.0):
                advance()

        thread = threading.Thread(target=follow, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            advance()
