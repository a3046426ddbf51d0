"""Show a progress bar on the driver's terminal that follows the journal of a run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from medspark.track.journal import JournalReader, Record

__all__ = ["progress"]

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0


@contextmanager
def progress(journal: Path, *, steps: int, name: str) -> Iterator[None]:
    """Show progress over ``steps`` while the block runs; without a terminal, only log epochs."""
    over = threading.Event()
    with tqdm(total=steps, desc=name, unit="step", disable=None, leave=False) as bar:
        line = _Line(bar, JournalReader(journal))
        thread = threading.Thread(target=line.follow, args=(over,), name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


class _Line:
    def __init__(self, bar: tqdm[None], reader: JournalReader) -> None:
        self._bar = bar
        self._reader = reader

    def follow(self, over: threading.Event) -> None:
        """Show new records until ``over`` is set, and the remaining ones at the end."""
        while not over.wait(_POLL_SECONDS):
            self._show()
        self._show()

    def _show(self) -> None:
        for record in self._reader.poll():
            self._advance(record)

    def _advance(self, record: Record) -> None:
        self._bar.update(max(0, record.step - self._bar.n))
        shown = {
            key: record.metrics[key]
            for key in ("loss", "images_per_second")
            if key in record.metrics
        }
        if shown:
            self._bar.set_postfix(
                {key: f"{value:.3g}" for key, value in shown.items()}, refresh=False
            )
        if "val/score" in record.metrics:
            logger.info("step %d: validation score %.3f", record.step, record.metrics["val/score"])
