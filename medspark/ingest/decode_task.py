"""Decode files in a Spark task: read paths, write one Parquet part, report a row per outcome.

Pixels never go through Spark. A task writes its samples itself and reports small rows. A file that
fails to decode, in any way, becomes a quarantine row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyspark.sql.pandas.types import from_arrow_schema

from medspark.images.content import HEAD_BYTES, content_of
from medspark.images.decode import SMALL_BYTES, decode
from medspark.images.deidentify import Privacy, Pseudonyms
from medspark.images.frame import Attributes, Frame, Rendered
from medspark.images.guard import GuardedDecoder
from medspark.images.reasons import Reason, Unreadable
from medspark.images.rendering import Rendering
from medspark.ingest import ledger, npz
from medspark.ingest.config import ArchiveLimits
from medspark.ingest.ledger import CONFLICTING_LABEL, QUARANTINED, SAMPLE
from medspark.ingest.parts import Part, PartWriter
from medspark.memory import keep_freed_memory
from medspark.spark import storage

_LOGGER = logging.getLogger(__name__)

_CHUNK = 1 << 20

# Besides ledger rows, a task reports its part, in a row that has a ``part_sha256``.
OUTCOME_SCHEMA = pa.schema(
    [*ledger.SCHEMA, ("sealed_path", pa.string()), ("part_rows", pa.int64()),
     ("part_bytes", pa.int64()), ("part_sha256", pa.string())]
)  # fmt: skip
OUTCOME_SPARK_SCHEMA = from_arrow_schema(OUTCOME_SCHEMA)

Outcome = dict[str, Any]


@dataclass(frozen=True)
class DecodeFiles:
    """The decoding task with all its settings. It is pickled: no Spark setting holds the key."""

    source: str
    source_key: str
    samples: str
    generation: str
    rendering: Rendering
    limits: ArchiveLimits
    privacy: Privacy
    pseudonyms: Pseudonyms
    label_attribute: str | None = None
    guarded: bool = True

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
            with self._opened(row["path"], row["size"]) as (source, sha256):
                known["content_key"] = self.pseudonyms.content(sha256)
                self._check_label(row, source)
                return [known | self._store(frame, row, writer) for frame in self._frames(source)]
        except _Conflict:
            verdict = (CONFLICTING_LABEL, "the label table gives this file two labels")
        except Unreadable as error:
            verdict = (error.reason.value, error.message)
        except Exception as error:  # noqa: BLE001 - a bad file must not fail the task
            verdict = (Reason.DECODE_FAILED.value, f"{type(error).__name__} while decoding")
        return [known | {"outcome": QUARANTINED, "reason": verdict[0], "message": verdict[1]}]

    def _frames(self, source: str | bytes) -> Iterator[Frame]:
        if self.guarded:
            return _guard(self).decode(source)
        return decode(source, **self._settings())

    def _settings(self) -> dict[str, Any]:
        return {
            "rendering": self.rendering,
            "limits": self.limits,
            "pseudonyms": self.pseudonyms,
            "privacy": self.privacy,
        }

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
            "patient_key": self._patient_key(frame, row),
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

    def _patient_key(self, frame: Frame, row: dict[str, Any]) -> str:
        # A file without any patient id counts as a patient.
        known = row["patient_key"] or frame.attributes.patient_key
        return str(known or self.pseudonyms.name("file-as-patient", row["path"]))

    def _may_open(self, path: str) -> bool:
        return self.limits.follow_links or storage.is_inside(self.source, path)

    @contextmanager
    def _opened(self, path: str, size: int) -> Iterator[tuple[str | bytes, str]]:
        """Yield the file's bytes, or a local path to them, with their SHA-256."""
        if size == storage.OUTSIDE or not self._may_open(path):
            raise Unreadable(Reason.LINK_OUTSIDE)
        if size < 0:
            raise Unreadable(Reason.UNREADABLE_FILE, "not a regular file, or a link to nothing")
        self.limits.check_file(size)
        if npz.is_npz(self.source):
            content = npz.read_image(self.source, path, run=self.generation, limits=self.limits)
            yield content, hashlib.sha256(content).hexdigest()
            return
        system, inside = storage.filesystem(storage.join(self.source, path))
        try:
            if size <= SMALL_BYTES:  # read once; a larger file is hashed, then read in place
                content = bytes(system.cat_file(inside))
                yield content, hashlib.sha256(content).hexdigest()
                return
            with system.open(inside, "rb") as file:
                if storage.is_local(self.source):
                    yield inside, hashlib.file_digest(file, "sha256").hexdigest()
                    return
                with tempfile.NamedTemporaryFile() as copy:
                    digest = hashlib.sha256()
                    while chunk := file.read(_CHUNK):
                        digest.update(chunk)
                        copy.write(chunk)
                    copy.flush()
                    yield copy.name, digest.hexdigest()
        except OSError as error:
            raise Unreadable(Reason.UNREADABLE_FILE, error.strerror or "") from None


# A decoder process takes a second to start, so it lives as long as Spark's reused Python worker,
# not as long as a task. It ends with the worker.
_guards: dict[str, GuardedDecoder] = {}


def _guard(decoding: DecodeFiles) -> GuardedDecoder:
    if decoding.generation not in _guards:
        while _guards:
            _guards.popitem()[1].close()
        _guards[decoding.generation] = GuardedDecoder(**decoding._settings())
    return _guards[decoding.generation]


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
