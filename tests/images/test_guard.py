"""The decoder process: reused for good files, and replaced after a crash or time-out."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pydicom import uid
from pydicom.encaps import encapsulate

from medspark.images import phantom
from medspark.images.decode import decode
from medspark.images.guard import GuardedDecoder
from medspark.images.limits import Limits
from medspark.images.reasons import Reason, Unreadable
from medspark.images.rendering import Rendering

MakeDicom = Callable[..., bytes]

SMALL = Rendering(size=16)
CONFIG = phantom.PhantomConfig(count=8, size=32, syntaxes=("jpeg_ls", "png", "deflated"))


@pytest.fixture
def guard() -> Iterator[GuardedDecoder]:
    with GuardedDecoder(rendering=SMALL) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    return [phantom.encode(study, CONFIG) for study in phantom.plan(CONFIG)]


def process_of(guard: GuardedDecoder) -> int:
    assert guard._child is not None
    return guard._child._process.pid


def test_guarded_frames_are_those_of_plain_decoding(
    guard: GuardedDecoder, files: list[bytes], tmp_path: Path
) -> None:
    path = tmp_path / "image"
    path.write_bytes(files[0])

    for source in (path, *files):
        (ours,), (plain,) = guard.decode(source), decode(source, rendering=SMALL)
        assert np.array_equal(ours.pixels, plain.pixels)
        assert (ours.attributes, ours.rendered) == (plain.attributes, plain.rendered)


@pytest.mark.parametrize("syntax", ["explicit", "implicit", "big_endian"])
def test_uncompressed_files_need_no_process(guard: GuardedDecoder, syntax: str) -> None:
    config = phantom.PhantomConfig(count=1, size=32, syntaxes=(syntax,))
    (study,) = phantom.plan(config)
    data = phantom.encode(study, config)

    (ours,), (plain,) = guard.decode(data), decode(data, rendering=SMALL)

    assert guard._child is None
    assert np.array_equal(ours.pixels, plain.pixels)


def test_several_frames_are_guarded_uncompressed_too(
    guard: GuardedDecoder, dicom: MakeDicom
) -> None:
    volume = np.arange(3, dtype=np.uint8)[:, None, None].repeat(16, 1).repeat(16, 2)

    found = [int(frame.pixels[0, 0]) for frame in guard.decode(dicom(volume, frames=3))]

    assert guard._child is not None
    assert found == [0, 1, 2]


@pytest.mark.parametrize("plain", [True, False])
def test_all_frames_of_a_file_share_its_seconds(dicom: MakeDicom, plain: bool) -> None:
    """No frame is slow, but together they exceed the time limit of the file."""
    frames, side = 4000, 64
    blank = (1).to_bytes(4, "little") + (64).to_bytes(4, "little") + bytes(56)
    runs = encapsulate([blank + b"\x81\0" * (side * side // 128)] * frames, has_bot=False)
    syntax = uid.ExplicitVRLittleEndian if plain else uid.RLELossless
    data = dicom(
        np.zeros((side, side), np.uint8), syntax=syntax, frames=frames,
        pixel_data=bytes(side * side * frames) if plain else runs,
    )  # fmt: skip
    limits, seen = Limits(frame_seconds=60, file_seconds=0.2), 0

    with GuardedDecoder(rendering=Rendering(size=224), limits=limits) as guard:
        with pytest.raises(Unreadable) as caught:
            for _ in guard.decode(data):
                seen += 1
        assert caught.value.reason is Reason.DECODE_TIMEOUT

    assert seen < frames


def test_what_the_caller_takes_between_two_frames_is_not_counted(dicom: MakeDicom) -> None:
    volume = np.zeros((4, 16, 16), np.uint8)
    with GuardedDecoder(rendering=SMALL, limits=Limits(file_seconds=4)) as guard:
        for _ in guard.decode(dicom(volume, frames=4)):
            time.sleep(1.5)


def test_a_file_that_only_seems_uncompressed_is_guarded(
    guard: GuardedDecoder, files: list[bytes]
) -> None:
    data = next(data for data in files if b"1.2.4.80" in data[:400])
    lure = b"\x02\0\x10\0UI\x12\x001.2.840.10008.1.2\0"

    list(guard.decode(lure + data[len(lure) :]))

    assert guard._child is not None


def test_a_long_header_is_guarded(guard: GuardedDecoder) -> None:
    config = phantom.PhantomConfig(count=1, size=32, syntaxes=("explicit",))
    (study,) = phantom.plan(config)
    head = phantom.header(study, config)
    head.add_new(0x00091002, "OB", bytes(1 << 19))
    data = phantom.to_bytes(head, phantom.stored_values(study, config), study)

    assert len(list(guard.decode(data))) == 1
    assert guard._child is not None


def test_one_process_serves_many_files_unreadable_ones_too(
    guard: GuardedDecoder, files: list[bytes]
) -> None:
    list(guard.decode(files[0]))
    first = process_of(guard)

    with pytest.raises(Unreadable, match="not_an_image"):
        list(guard.decode(b"hello"))
    list(guard.decode(files[1]))

    assert process_of(guard) == first


def test_a_dead_process_costs_one_file(guard: GuardedDecoder, files: list[bytes]) -> None:
    list(guard.decode(files[0]))
    os.kill(process_of(guard), signal.SIGKILL)

    with pytest.raises(Unreadable) as caught:
        list(guard.decode(files[1]))

    assert caught.value.reason is Reason.DECODER_CRASHED
    assert len(list(guard.decode(files[2]))) == 1


def test_a_process_that_hangs_is_replaced(files: list[bytes]) -> None:
    with GuardedDecoder(rendering=SMALL, limits=Limits(frame_seconds=4)) as guard:
        list(guard.decode(files[0]))
        os.kill(process_of(guard), signal.SIGSTOP)

        with pytest.raises(Unreadable) as caught:
            list(guard.decode(files[1]))

        assert caught.value.reason is Reason.DECODE_TIMEOUT
        assert len(list(guard.decode(files[2]))) == 1


def test_a_file_that_needs_more_memory_than_allowed_is_refused(tmp_path: Path) -> None:
    config = phantom.PhantomConfig(count=1, syntaxes=("explicit",), bits=(16,))
    (study,) = phantom.plan(config)
    head = phantom.header(study, config)
    head.Rows = head.Columns = 8192
    size = 8192 * 8192 * 2
    data = phantom.to_bytes(head, np.zeros((2, 2), np.uint16), study)
    path = tmp_path / "large"
    with path.open("wb") as file:  # sparse: its zeros are never written
        file.write(data[:-12] + size.to_bytes(4, "little"))
        file.truncate(len(data) - 8 + size)
    limits = Limits(memory_bytes=1 << 28)

    with GuardedDecoder(rendering=SMALL, limits=limits) as guard:
        with pytest.raises(Unreadable) as caught:
            list(guard.decode(path))
        assert caught.value.reason in (Reason.TOO_LARGE, Reason.DECODER_CRASHED)


def test_a_caller_who_stops_half_way_gets_the_next_file_whole(
    guard: GuardedDecoder, files: list[bytes]
) -> None:
    frames = guard.decode(files[0])
    first = next(frames)
    frames.close()  # type: ignore[attr-defined]

    (second,) = guard.decode(files[1])

    assert first.pixel_sha256 != second.pixel_sha256


def test_closing_leaves_no_process(guard: GuardedDecoder, files: list[bytes]) -> None:
    list(guard.decode(files[0]))
    process = process_of(guard)

    guard.close()

    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_guard_travels_without_its_process(guard: GuardedDecoder, files: list[bytes]) -> None:
    list(guard.decode(files[0]))

    with pickle.loads(pickle.dumps(guard)) as copy:
        assert len(list(copy.decode(files[1]))) == 1
