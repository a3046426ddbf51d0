"""Decode any image file to frames; the file's content decides its kind, not its name."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from medspark.images.content import HEAD_BYTES, Content, content_of
from medspark.images.deidentify import Privacy, Pseudonyms
from medspark.images.dicom import NotPlain, decode_dicom, looks_plain
from medspark.images.frame import Frame
from medspark.images.limits import Limits
from medspark.images.raster import decode_raster
from medspark.images.reasons import Reason, Unreadable
from medspark.images.rendering import Rendering

Source = str | Path | bytes | BinaryIO

# Files up to this size, in bytes, are read at once, which is faster than seeking in them.
SMALL_BYTES = 1 << 25


def decode(
    source: Source,
    *,
    rendering: Rendering,
    limits: Limits | None = None,
    pseudonyms: Pseudonyms | None = None,
    privacy: Privacy | None = None,
    plain_only: bool = False,
) -> Iterator[Frame]:
    """Yield the frames of ``source``: a local path, the file's bytes, or a seekable binary file.

    Every file that cannot be used raises Unreadable and no other exception. A multi-frame file may
    have yielded frames before. With ``plain_only``, files that need native code, have several
    frames or a long header raise NotPlain before the first frame. The remaining files are single
    frames of at most 32 MiB, which are cheap and cannot crash a process.
    """
    limits, privacy = limits or Limits(), privacy or Privacy()
    frames = _decode(source, rendering, limits, pseudonyms, privacy, plain_only)
    while True:
        # Entered per frame, so that the caller's code never runs with silenced warnings.
        with _only_unreadable():
            frame = next(frames, None)
        if frame is None:
            return
        yield frame


def _decode(
    source: Source,
    rendering: Rendering,
    limits: Limits,
    pseudonyms: Pseudonyms | None,
    privacy: Privacy,
    plain_only: bool,
) -> Iterator[Frame]:
    with _opened(source, limits) as (file, size):
        head = file.read(HEAD_BYTES)
        content = content_of(head)
        if content is None:
            raise Unreadable(Reason.NOT_AN_IMAGE)
        plain = content is Content.DICOM and size <= SMALL_BYTES and looks_plain(head)
        if plain_only and not plain:
            raise NotPlain
        file = _in_memory(file, size)
        if content is Content.RASTER:
            yield from decode_raster(file, size, rendering=rendering, limits=limits)
        else:
            yield from decode_dicom(
                file,
                size,
                rendering=rendering,
                limits=limits,
                privacy=privacy,
                pseudonyms=pseudonyms,
                plain_only=plain_only,
            )


@contextmanager
def _opened(source: Source, limits: Limits) -> Iterator[tuple[BinaryIO, int]]:
    """Open ``source`` and yield it with its size in bytes. Raises Unreadable beyond limits."""
    if isinstance(source, bytes):
        limits.check_file(len(source))
        yield io.BytesIO(source), len(source)
        return
    try:
        file = source if not isinstance(source, str | Path) else open(source, "rb")  # noqa: SIM115
    except OSError as error:
        raise Unreadable(Reason.UNREADABLE_FILE, error.strerror or "") from None
    with file if isinstance(source, str | Path) else _kept_open(file):
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        limits.check_file(size)
        yield file, size


def _in_memory(file: BinaryIO, size: int) -> BinaryIO:
    """Return ``file`` at its start, as a copy in memory if it is small."""
    file.seek(0)
    if size > SMALL_BYTES or isinstance(file, io.BytesIO):
        return file
    return io.BytesIO(file.read())


@contextmanager
def _kept_open(file: BinaryIO) -> Iterator[BinaryIO]:
    yield file


@contextmanager
def _only_unreadable() -> Iterator[None]:
    """Turn every exception of a parser or decoder into Unreadable, and silence its messages.

    Warnings, log lines and messages of decoders quote header values, which may name a patient.
    """
    logger = logging.getLogger("pydicom")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (Unreadable, NotPlain, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except MemoryError:
        raise Unreadable(Reason.TOO_LARGE, "not enough memory to decode it") from None
    except EOFError:
        raise Unreadable(Reason.TRUNCATED, "the header ends early") from None
    except BaseException as error:  # noqa: BLE001 - Rust decoders panic with a BaseException
        if isinstance(error, OSError) and error.errno:  # decoders raise OSError without errno
            raise Unreadable(Reason.UNREADABLE_FILE, error.strerror or "") from None
        raise Unreadable(Reason.DECODE_FAILED, f"{type(error).__name__} in a decoder") from None
    finally:
        logger.disabled = was_disabled
