"""Decode files in a Spark task: read paths, write one Parquet part, report a row per outcome.

Pixels never go through Spark. A task writes its samples itself and reports small rows. A file that
fails to decode, in any way, becomes a quarantine row.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyspark.sql.pandas.types import from_arrow_schema

from medspark.images.content import HEAD_BYTES, content_of
from medspark.images.deidentify import Pseudonyms
from medspark.images.frame import Attributes, Frame, Rendered
from medspark.images.reasons import Reason, Unreadable
from medspark.ingest import ledger
from medspark.ingest.ledger import CONFLICTING_LABEL, QUARANTINED, SAMPLE
from medspark.ingest.parts import Part, PartWriter
from medspark.ingest.reading import ArchiveReader, verdict
from medspark.memory import keep_freed_memory

# Besides ledger rows, a task reports its part, in a row that has a ``part_sha256``.
OUTCOME_SCHEMA = pa.schema(
    [*ledger.SCHEMA, ("sealed_path", pa.string()), ("part_rows", pa.int64()),
     ("part_bytes", pa.int64()), ("part_sha256", pa.string())]
)  # fmt: skip
OUTCOME_SPARK_SCHEMA = from_arrow_schema(OUTCOME_SCHEMA)

Outcome = dict[str, Any]


@dataclass(frozen=True)
class DecodeFiles:
    """The decoding task with all its settings."""

    reader: ArchiveReader
    source_key: str
    samples: str
    generation: str
    label_attribute: str | None = None

    @property
    def pseudonyms(self) -> Pseudonyms:
        """The pseudonyms of the dataset."""
        return self.reader.pseudonyms

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Decode the files of ``batches`` (rows as annotated) and yield rows of OUTCOME_SCHEMA."""
        # Consecutive files need arrays of the same size. Returning the pages to the kernel and
        # requesting them again took a fifth of the time.
        keep_freed_memory()
        # The name is unique, so retries and speculative attempts never share a part. Only the rows
        # of the attempt that succeeds come back and are committed.
        name = f"data/{self.generation}/{uuid.uuid4().hex}.parquet"
        writer = PartWriter(self.samples, name)
        for batch in batches:
            outcomes: list[Outcome] = []
            for row in batch.to_pylist():
                outcomes += self._outcomes(row, writer)
            yield _batch(outcomes)
        part = writer.close()
        if part:
            yield _batch([_part_row(part)])

    def _outcomes(self, row: dict[str, Any], writer: PartWriter) -> list[Outcome]:
        """Return one outcome per frame of a file, or one for the file if it cannot be used."""
        known = {name: row[name] for name in ("file_key", "fingerprint", "size", "sealed_path")}
        known |= {"source_key": self.source_key, "content_key": None}
        row = row | {"path": self.pseudonyms.unseal(row["sealed_path"])}
        try:
            with self.reader.opened(row["path"], row["size"]) as (source, sha256):
                known["content_key"] = self.pseudonyms.content(sha256)
                self._check_label(row, source)
                return [
                    known | self._store(frame, row, writer) for frame in self.reader.frames(source)
                ]
        except _Conflict:
            reason, message = CONFLICTING_LABEL, "the label table gives this file two labels"
        except Exception as error:  # noqa: BLE001 - a bad file must not fail the task
            reason, message = verdict(error)
        return [known | {"outcome": QUARANTINED, "reason": reason, "message": message}]

    def _check_label(self, row: dict[str, Any], source: str | bytes) -> None:
        if row["conflict"]:
            raise _Conflict
        if row["label"] is None and self.label_attribute is None:
            head = source[:HEAD_BYTES] if isinstance(source, bytes) else _head(source)
            raise Unreadable(Reason.NO_LABEL if content_of(head) else Reason.NOT_AN_IMAGE)

    def _store(self, frame: Frame, row: dict[str, Any], writer: PartWriter) -> Outcome:
        label = row["label"]
        if self.label_attribute is not None:
            label = getattr(frame.attributes, self.label_attribute)
        if label is None:
            raise Unreadable(Reason.NO_LABEL)
        height, width = frame.pixels.shape[:2]
        kept: Outcome = {
            "frame": frame.number,
            "sample_key": self._sample_key(frame, row["path"]),
            "patient_key": row["patient_key"] or self.reader.patient_key(frame, row["path"]),
            "label": label,
            "split": row["split"],
            "site": row["site"],
            "pixel_key": self.pseudonyms.pixels(frame.pixel_sha256),
            "height": height,
            "width": width,
            "channels": 1 if frame.pixels.ndim == 2 else frame.pixels.shape[2],
            "bits": 8 * frame.pixels.dtype.itemsize,
        }
        number = writer.add(_sample(frame, kept))
        return kept | {"outcome": SAMPLE, "part": writer.name, "row": number}

    def _sample_key(self, frame: Frame, path: str) -> str:
        # The path is relative to the source: a copy of the archive gives the same dataset.
        return self.pseudonyms.name("sample", f"{path}\n{frame.number}\n{frame.pixel_sha256}")


class _Conflict(Exception):  # noqa: N818 - control flow, not an error
    """The label table gives one file two labels."""


def _sample(frame: Frame, kept: Outcome) -> dict[str, Any]:
    # dataclasses.asdict would copy deeply, which takes 5 % of an image's time.
    row = {name: getattr(frame.attributes, name) for name in _ATTRIBUTES}
    row |= {f"rendered_{name}": getattr(frame.rendered, name) for name in _RENDERED}
    pixels = frame.pixels.astype(frame.pixels.dtype.newbyteorder("<"), copy=False)
    return row | kept | {"pixels": pixels.tobytes()}


_ATTRIBUTES = tuple(field.name for field in dataclasses.fields(Attributes))
_RENDERED = tuple(field.name for field in dataclasses.fields(Rendered))


def _head(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD_BYTES)


def _part_row(part: Part) -> Outcome:
    return {
        "part": part.path,
        "part_rows": part.rows,
        "part_bytes": part.bytes,
        "part_sha256": part.sha256,
    }


def _batch(outcomes: list[Outcome]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(outcomes, schema=OUTCOME_SCHEMA)
