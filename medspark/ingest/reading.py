"""Open and decode the files of an archive in a Spark task, within limits and guarded."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from medspark import storage
from medspark.images.decode import SMALL_BYTES, decode
from medspark.images.deidentify import Privacy, Pseudonyms
from medspark.images.frame import Frame
from medspark.images.guard import GuardedDecoder
from medspark.images.reasons import Reason, Unreadable
from medspark.images.rendering import Rendering
from medspark.ingest import npz
from medspark.ingest.config import ArchiveLimits
from medspark.object_store import StoreError

__all__ = ["ArchiveReader", "verdict"]

_CHUNK = 1 << 20


@dataclass(frozen=True)
class ArchiveReader:
    """Opens and decodes the files of one source. It is pickled: no Spark setting holds the key.

    ``run`` names the Spark job. What a worker keeps from task to task (the decoder process, arrays
    of an .npz archive) is made anew for another run.
    """

    source: str
    run: str
    rendering: Rendering
    limits: ArchiveLimits
    privacy: Privacy
    pseudonyms: Pseudonyms
    guarded: bool = True

    @contextmanager
    def opened(
        self, path: str, size: int, *, hashed: bool = True
    ) -> Iterator[tuple[str | bytes, str]]:
        """Yield the file's bytes, or a local path to them, with their SHA-256 if ``hashed``.

        ``path`` is relative to the source. Raises Unreadable for a file that may not or cannot be
        read.
        """
        if size == storage.OUTSIDE or not self._may_open(path):
            raise Unreadable(Reason.LINK_OUTSIDE)
        if size < 0:
            raise Unreadable(Reason.UNREADABLE_FILE, "not a regular file, or a link to nothing")
        self.limits.check_file(size)
        if npz.is_npz(self.source):
            content = npz.read_image(self.source, path, run=self.run, limits=self.limits)
            yield content, _digest(content) if hashed else ""
            return
        system, inside = storage.filesystem(storage.join(self.source, path))
        try:
            if size <= SMALL_BYTES:  # read once; a larger file is hashed, then read in place
                content = bytes(system.cat_file(inside))
                yield content, _digest(content) if hashed else ""
                return
            with system.open(inside, "rb") as file:
                if storage.is_local(self.source):
                    yield inside, hashlib.file_digest(file, "sha256").hexdigest() if hashed else ""
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

    def frames(self, source: str | bytes) -> Iterator[Frame]:
        """Yield the frames of an opened file. Raises Unreadable."""
        if self.guarded:
            return _guard(self).decode(source)
        return decode(source, **self._settings())

    def patient_key(self, frame: Frame, path: str) -> str:
        """Return the patient of the header; a file without any patient id counts as a patient."""
        known = frame.attributes.patient_key
        return known or self.pseudonyms.name("file-as-patient", path)

    def _may_open(self, path: str) -> bool:
        return self.limits.follow_links or storage.is_inside(self.source, path)

    def _settings(self) -> dict[str, Any]:
        return {
            "rendering": self.rendering,
            "limits": self.limits,
            "pseudonyms": self.pseudonyms,
            "privacy": self.privacy,
        }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def verdict(error: Exception) -> tuple[str, str]:
    """Return the quarantine reason and message of a file whose opening or decoding raised.

    Raises ``error`` again if the store of all files failed.
    """
    if isinstance(error, StoreError):  # not the fault of a file
        raise error
    if isinstance(error, Unreadable):
        return error.reason.value, error.message
    return Reason.DECODE_FAILED.value, f"{type(error).__name__} while decoding"


# A decoder process takes a second to start, so it lives as long as Spark's reused Python worker,
# not as long as a task. It ends with the worker.
_guards: dict[str, GuardedDecoder] = {}


def _guard(reader: ArchiveReader) -> GuardedDecoder:
    if reader.run not in _guards:
        while _guards:
            _guards.popitem()[1].close()
        _guards[reader.run] = GuardedDecoder(**reader._settings())
    return _guards[reader.run]
