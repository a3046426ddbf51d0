"""Answer files in a Spark task: decode a batch, and have the model answer it.

A batch from a remote archive is fetched while the model answers the one before it. With local files
a second thread would only take turns with the first: tasks have all cores already.

A task writes its rows itself, as one file that appears whole or not at all. A file that cannot be
decoded becomes a row with a reason.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from medspark import storage
from medspark.images.frame import Pixels
from medspark.ingest.reading import ArchiveReader, verdict
from medspark.memory import keep_freed_memory
from medspark.predict.folder import OUTCOMES, piece_name

__all__ = ["DONE", "Answer", "AnswerFiles", "Model"]

DONE = "piece string, files bigint"  # what a task reports: its file, and the rows in it
_DONE = pa.schema([("piece", pa.string()), ("files", pa.int64())])

Row = dict[str, Any]
Answer = dict[str, Any]
Decoded = list[tuple[Row, Pixels | None]]
T = TypeVar("T")


class Model(Protocol):
    """A model on an executor. It is pickled."""

    def __call__(self, images: Sequence[Pixels]) -> Sequence[Answer]:
        """Return label, probability and probabilities of ``images``, (H, W) or (H, W, 3) each."""


@dataclass(frozen=True)
class AnswerFiles:
    """The answering task with all its settings."""

    reader: ArchiveReader
    model: Model
    answers: str  # folder of the prediction
    batch_size: int

    def __call__(self, records: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Answer the files of ``records`` (rows as annotated), and report where the rows are."""
        keep_freed_memory()
        files = [row for record in records for row in record.to_pylist()]
        starts = range(0, len(files), self.batch_size)
        chosen = (files[start : start + self.batch_size] for start in starts)
        rows: list[Row] = []
        batches: Iterator[Decoded] = map(self._decoded, chosen)
        if not storage.is_local(self.reader.source):
            batches = _ahead(batches)
        for decoded in batches:
            rows += self._answered(decoded)
        if rows:
            done = {"piece": self._write(rows), "files": len(rows)}
            yield pa.RecordBatch.from_pylist([done], schema=_DONE)

    def _decoded(self, files: Sequence[Row]) -> Decoded:
        return [self._read(row) for row in files]

    def _read(self, row: Row) -> tuple[Row, Pixels | None]:
        """Return the file's row with its keys, and its pixels; or with a reason, and None."""
        known = {name: row[name] for name in ("file_key", "fingerprint")}
        path = self.reader.pseudonyms.unseal(row["sealed_path"])
        try:
            with self.reader.opened(path, row["size"], hashed=False) as (source, _):
                (frame,) = self.reader.frames(source)
        except Exception as error:  # noqa: BLE001 - a bad file must not fail the task
            reason, message = verdict(error)
            return known | {"reason": reason, "message": message}, None
        keys = ("study_key", "series_key", "instance_key")
        known |= {name: getattr(frame.attributes, name) for name in keys}
        patient = self.reader.patient_key(frame, path)
        return known | {"patient_key": patient, "frame": frame.number}, frame.pixels

    def _answered(self, decoded: Decoded) -> Iterator[Row]:
        images = [pixels for _, pixels in decoded if pixels is not None]
        answers = iter(self.model(images) if images else ())
        for row, pixels in decoded:
            yield row if pixels is None else row | next(answers)

    def _write(self, rows: list[Row]) -> str:
        content = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=OUTCOMES), content)
        # The name is unique, so that two attempts of a task share no file. Spark reports one of
        # them; after a kill, the commit takes each file's row once.
        name = piece_name(uuid.uuid4().hex, len(rows))
        storage.write_bytes(storage.join(self.answers, name), content.getvalue())
        return name


def _ahead(batches: Iterator[T]) -> Iterator[T]:
    """Yield ``batches``; a second thread makes the next one meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch
