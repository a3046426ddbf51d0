"""The journal of a run: metrics that rank 0 writes as small files and the driver reads live.

A segment is written whole under a temporary name and then renamed, never appended to, because
object-store mounts such as ``/Volumes`` have no append. The journal needs no network and no MLflow.
So a tracking server that is down does not slow training, and the journal can be published later.
"""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from medspark.documents import parse_json, read_regular
from medspark.files import write_whole

__all__ = ["Journal", "JournalReader", "Record"]

logger = logging.getLogger(__name__)

_SUFFIX = ".jsonl"
_LARGEST = 1 << 28  # bytes of a segment, far more than are written between two flushes


class Record(NamedTuple):
    """Metrics of one step, and their time (milliseconds since 1970)."""

    step: int
    time_ms: int
    metrics: dict[str, float]


class Journal:
    """Writes the metrics of one process to a directory; without a directory it discards them.

    Every rank may record to a journal, but only rank 0 gets a directory.
    """

    def __init__(self, directory: Path | None, *, flush_seconds: float = 2.0) -> None:
        self._directory = directory
        self._flush_seconds = flush_seconds
        self._pending: list[Record] = []
        self._flushed_at = -math.inf
        # A token per writer keeps a stalled older rank 0 from replacing a newer segment.
        self._token = uuid.uuid4().hex[:8]
        self._sequence = 0
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            self._sequence = 1 + max((_sequence(path) for path in _segments(directory)), default=-1)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep ``metrics`` of ``step``; they reach the disk within ``flush_seconds``."""
        if self._directory is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        self._pending.append(Record(step, int(time.time() * 1000), values))
        if time.monotonic() - self._flushed_at >= self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write pending records as one segment; after an I/O error, log it and keep them."""
        if self._directory is None or not self._pending:
            return
        self._flushed_at = time.monotonic()
        name = f"{self._sequence:08d}-{self._token}"
        try:
            _write_segment(self._directory, name, self._pending)
        except OSError as error:
            # Lost metrics must not stop the training.
            logger.warning("the journal could not be written and is kept in memory: %s", error)
            return
        self._sequence += 1
        self._pending = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.flush()


class JournalReader:
    """Yields each record of a journal once, in the order of writing, while it grows."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: set[str] = set()

    def poll(self) -> Iterator[Record]:
        """Yield the records of the segments that appeared since the last call."""
        for path in sorted(_segments(self._directory)):
            if path.name in self._seen:
                continue
            records = _read_segment(path)
            if records is None:
                return
            self._seen.add(path.name)
            yield from records


def _segments(directory: Path) -> list[Path]:
    return [path for path in directory.glob(f"*-*{_SUFFIX}") if path.name[:8].isdecimal()]


def _sequence(path: Path) -> int:
    return int(path.name.split("-", maxsplit=1)[0])


def _write_segment(directory: Path, name: str, records: list[Record]) -> None:
    lines = [json.dumps([record.step, record.time_ms, record.metrics]) for record in records]
    write_whole(directory / f"{name}{_SUFFIX}", "\n".join(lines) + "\n")


def _read_segment(path: Path) -> list[Record] | None:
    """Return the records of one segment, or None while a mount still shows it incomplete."""
    try:
        lines = read_regular(path, most=_LARGEST).decode().splitlines()
        return [_record(*parse_json(line)) for line in lines]
    except (OSError, ValueError, TypeError, AttributeError):  # not a record
        return None


def _record(step: int, time_ms: int, metrics: dict[str, float]) -> Record:
    return Record(int(step), int(time_ms), {key: float(value) for key, value in metrics.items()})
