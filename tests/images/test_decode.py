"""decode: every kind of file and source, and a single kind of error."""

from __future__ import annotations

import io
import logging
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medspark.images import decode as decoding
from medspark.images import phantom
from medspark.images.decode import decode
from medspark.images.reasons import Reason, Unreadable
from medspark.images.rendering import Rendering

SMALL = Rendering(size=16)


def _png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(file, "PNG")
    return file.getvalue()


def test_paths_bytes_and_open_files_give_the_same_frames(tmp_path: Path) -> None:
    data = _png()
    path = tmp_path / "anything"
    path.write_bytes(data)

    with path.open("rb") as file:
        sources = [data, path, str(path), io.BytesIO(data), file]
        digests = {next(decode(source, rendering=SMALL)).pixel_sha256 for source in sources}

    assert len(digests) == 1


def test_the_name_of_a_file_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "image.dcm"
    path.write_bytes(_png())

    assert next(decode(path, rendering=SMALL)).attributes.file_format == "png"


def test_a_missing_file_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(Unreadable) as caught:
        list(decode(tmp_path / "none", rendering=SMALL))

    assert caught.value.reason is Reason.UNREADABLE_FILE


class Panic(BaseException):
    """Stands for the exception of a decoder in Rust (pyo3's PanicException)."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Panic("JOHN^DOE"), Reason.DECODE_FAILED),
        (RecursionError("JOHN^DOE"), Reason.DECODE_FAILED),
        (MemoryError("JOHN^DOE"), Reason.TOO_LARGE),
        (OSError("JOHN^DOE"), Reason.DECODE_FAILED),
        (EOFError("JOHN^DOE"), Reason.TRUNCATED),
        (OSError(5, "Input/output error", "JOHN^DOE"), Reason.UNREADABLE_FILE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_a_decoder_raises_is_unreadable_and_quotes_nothing(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, reason: Reason
) -> None:
    def fail(*_: object, **__: object) -> Iterator[None]:
        raise error

    monkeypatch.setattr(decoding, "decode_raster", fail)

    with pytest.raises(Unreadable) as caught:
        list(decode(_png(), rendering=SMALL))

    assert caught.value.reason is reason
    assert "JOHN" not in f"{caught.value!r} {caught.value}"


def test_an_interruption_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Iterator[None]:
        raise KeyboardInterrupt

    monkeypatch.setattr(decoding, "decode_raster", fail)

    with pytest.raises(KeyboardInterrupt):
        list(decode(_png(), rendering=SMALL))


def test_the_callers_warnings_and_logs_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    frames = decode(_png(), rendering=SMALL)
    next(frames)

    with pytest.warns(UserWarning, match="mine"):
        warnings.warn("mine", stacklevel=1)
    with caplog.at_level(logging.WARNING, "pydicom"):
        logging.getLogger("pydicom").warning("mine")

    assert caplog.messages == ["mine"]
    frames.close()  # type: ignore[attr-defined]


def test_an_unreadable_file_survives_pickling() -> None:
    error = Unreadable(Reason.TRUNCATED, "short")

    copy = pickle.loads(pickle.dumps(error))

    assert (copy.reason, copy.message) == (Reason.TRUNCATED, "short")


def test_every_reason_is_explained() -> None:
    assert all(reason.meaning and reason.value == reason.value.lower() for reason in Reason)


# --- fuzzing ----------------------------------------------------------------------------------


def _seeds() -> list[bytes]:
    config = phantom.PhantomConfig(count=40, size=32, seed=3)
    files = [phantom.encode(study, config) for study in phantom.plan(config)]
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for kind in ("JPEG", "TIFF", "BMP"):
        file = io.BytesIO()
        image.save(file, kind)
        files.append(file.getvalue())
    return files


SEEDS = _seeds()

Mutation = Callable[[bytearray], None]


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """Files with bytes changed, cut out, repeated or swapped for what parsers trip over."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["byte", "cut", "drop", "repeat", "extreme"]))
        if kind == "byte":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 40))]
        else:
            data[at : at + 4] = draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f"]))
    return bytes(data)


# MEDSPARK_FUZZ=100000 tries 100,000 files, in about ten minutes.
@settings(max_examples=int(os.environ.get("MEDSPARK_FUZZ", "300")))
@given(data=damaged_files())
def test_a_damaged_file_is_an_image_or_unreadable_and_nothing_else(data: bytes) -> None:
    message = ""
    try:
        shapes = {frame.pixels.shape[:2] for frame in decode(data, rendering=SMALL)}
    except Unreadable as unreadable:
        shapes, message = set(), str(unreadable)

    assert shapes <= {(16, 16)}
    assert phantom.CANARY not in message
