"""DICOM files of every kind: decoded images, and reasons for refused files."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from dicom_frames import PYDICOM_FILES, SMALL, frames_of, refused
from pydicom.dataset import Dataset
from stored_values import stored_frames

from medspark.images import phantom
from medspark.images.decode import decode
from medspark.images.limits import Limits
from medspark.images.reasons import Reason, Unreadable
from medspark.images.rendering import Rendering

MakeDicom = Callable[..., bytes]
Array = npt.NDArray[Any]


def stored_of(data: bytes) -> list[Array]:
    return list(stored_frames(io.BytesIO(data), len(data), limits=Limits()))


# --- transfer syntaxes ------------------------------------------------------------------------

COMPRESSIBLE = [name for name in phantom.SYNTAXES if name != "png"]


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_every_transfer_syntax_gives_the_same_pixels(bits: int) -> None:
    config = phantom.PhantomConfig(count=1, size=75)
    study = replace(next(iter(phantom.plan(config))), bits=bits, signed=False, inverted=False)
    expected = phantom.stored_values(replace(study, syntax="explicit"), config)

    digests, images = set(), set()
    for syntax in COMPRESSIBLE:
        data = phantom.encode(replace(study, syntax=syntax), config)
        assert np.array_equal(stored_of(data)[0], expected), syntax
        (frame,) = frames_of(data)
        digests.add(frame.pixel_sha256)
        images.add(frame.pixels.tobytes())

    assert len(digests) == len(images) == 1


def test_monochrome1_and_2_of_one_object_look_the_same() -> None:
    config = phantom.PhantomConfig(count=1, size=64)
    study = replace(next(iter(phantom.plan(config))), bits=12, signed=False, syntax="explicit")

    (one,) = frames_of(phantom.encode(replace(study, inverted=True), config))
    (two,) = frames_of(phantom.encode(replace(study, inverted=False), config))

    assert np.abs(one.pixels.astype(int) - two.pixels).max() <= 1
    assert one.pixel_sha256 != two.pixel_sha256
    assert one.rendered.inverted
    assert not two.rendered.inverted


# Reasons for pydicom's own files; every file that is not listed is an image.
REFUSED = {
    "JPGExtended.dcm": Reason.GPL_DECODER_ONLY,
    "JPEG-lossy.dcm": Reason.DECODE_FAILED,
    **dict.fromkeys(
        ["ExplVR_BigEndNoMeta.dcm", "ExplVR_LitEndNoMeta.dcm", "meta_missing_tsyntax.dcm"],
        Reason.NO_FILE_META,
    ),
    "rtstruct.dcm": Reason.NO_FILE_META,
    "JPEG2000-embedded-sequence-delimiter.dcm": Reason.INCONSISTENT_HEADER,
    "nested_priv_SQ.dcm": Reason.INCONSISTENT_HEADER,
    **dict.fromkeys(["MR_truncated.dcm", "rtplan_truncated.dcm"], Reason.TRUNCATED),
    "no_meta.dcm": Reason.NOT_AN_IMAGE,
    **dict.fromkeys(
        ["UN_sequence.dcm", "empty_charset_LEI.dcm", "no_meta_group_length.dcm", "priv_SQ.dcm"],
        Reason.NO_PIXEL_DATA,
    ),
    **dict.fromkeys(
        ["reportsi.dcm", "reportsi_with_empty_number_tags.dcm", "rtplan.dcm", "test-SR.dcm"],
        Reason.NO_PIXEL_DATA,
    ),
    "waveform_ecg.dcm": Reason.NO_PIXEL_DATA,
}


@pytest.mark.parametrize("path", sorted(PYDICOM_FILES.glob("*.dcm")), ids=lambda path: path.name)
def test_each_of_pydicoms_files_is_an_image_or_has_a_listed_reason(path: Path) -> None:
    if path.name in REFUSED:
        assert refused(path) is REFUSED[path.name]
    else:
        shapes = {frame.pixels.shape[:2] for frame in frames_of(path)}
        assert shapes == {(16, 16)}


@pytest.mark.parametrize(
    "name", ["MR_small_RLE", "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless", "MR_small_expb"]
)
def test_lossless_copies_of_one_image_share_a_digest(name: str) -> None:
    (reference,) = frames_of(PYDICOM_FILES / "MR_small.dcm")
    (frame,) = frames_of(PYDICOM_FILES / f"{name}.dcm")

    assert frame.pixel_sha256 == reference.pixel_sha256
    assert np.array_equal(frame.pixels, reference.pixels)


def test_the_mixed_archive_agrees_with_its_manifest() -> None:
    """Set MEDSPARK_DICOM_MIX to a folder with manifest.csv (path, decode, shape, pixel_sha256)."""
    folder = os.environ.get("MEDSPARK_DICOM_MIX")
    if not folder:
        pytest.skip("MEDSPARK_DICOM_MIX names no folder")
    with (Path(folder) / "manifest.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    outcomes = Counter(_outcome(Path(folder) / row["path"], row) for row in rows)

    assert set(outcomes) <= {"same", "lossy", "quarantined", "gpl_decoder_only"}
    assert outcomes["same"] > 50


def _outcome(path: Path, row: dict[str, str]) -> str:
    try:
        stored = np.stack(stored_of(path.read_bytes()))
    except Unreadable as unreadable:
        expected = row["decode"] != "ok"
        return "quarantined" if expected else unreadable.reason.value
    if row["decode"] != "ok":
        return f"{path.name} should not decode"
    if hashlib.sha256(stored.tobytes()).hexdigest() == row["pixel_sha256"]:
        return "same"
    lossy = "Lossless" not in row["ts"] and abs(stored.mean() - float(row["mean"])) < 0.5
    return "lossy" if lossy else f"{path.name} differs"


# --- layouts ----------------------------------------------------------------------------------


def test_a_file_without_preamble_is_read(dicom: MakeDicom, ramp: Array) -> None:
    data = dicom(ramp)

    assert np.array_equal(stored_of(data[132:])[0], ramp)


def test_planar_colour_is_the_same_as_colour_by_pixel(dicom: MakeDicom) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    planar = np.ascontiguousarray(rgb.transpose(2, 0, 1)).tobytes()

    data = dicom(rgb, PlanarConfiguration=1, pixel_data=planar)

    assert np.array_equal(stored_of(data)[0], rgb)


def test_bits_above_bits_stored_are_no_part_of_the_value(dicom: MakeDicom, ramp: Array) -> None:
    dirty = ramp | 0xA000

    assert np.array_equal(stored_of(dicom(dirty, BitsStored=12))[0], ramp)


def test_signed_values_narrower_than_their_cell_keep_their_sign(dicom: MakeDicom) -> None:
    values = np.arange(-2048, 2048, dtype=np.int16).reshape(64, 64)
    cells = (values & 0x0FFF).astype(np.int16)  # the sign is bit 11 only

    assert np.array_equal(stored_of(dicom(cells, BitsStored=12))[0], values)


def test_one_bit_pixels_are_black_and_white(dicom: MakeDicom) -> None:
    bits = np.random.default_rng(0).integers(0, 2, (16, 16)).astype(np.uint8)
    packed = np.packbits(bits.ravel(), bitorder="little").tobytes()

    data = dicom(bits, BitsAllocated=1, BitsStored=1, pixel_data=packed)

    assert np.array_equal(frames_of(data)[0].pixels, bits * 255)


def test_a_palette_becomes_colour(dicom: MakeDicom) -> None:
    def add_palette(data: Dataset) -> None:
        for channel, at in (("Red", 0), ("Green", 1), ("Blue", 2)):
            table = np.zeros(256, np.uint16)
            table[at] = 65535
            setattr(data, f"{channel}PaletteColorLookupTableDescriptor", [256, 0, 16])
            setattr(data, f"{channel}PaletteColorLookupTableData", table.tobytes())

    index = np.arange(256, dtype=np.uint8).reshape(16, 16)
    data = dicom(index, PhotometricInterpretation="PALETTE COLOR", prepare=add_palette)

    (frame,) = frames_of(data)

    assert frame.pixels[0, :4].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]]


def test_ybr_becomes_rgb(dicom: MakeDicom) -> None:
    ybr = np.zeros((16, 16, 3), np.uint8)
    ybr[...] = 76, 85, 255  # pure red by ITU-R BT.601

    (frame,) = frames_of(dicom(ybr, PhotometricInterpretation="YBR_FULL"))

    assert np.abs(frame.pixels.astype(int) - [254, 0, 0]).max() <= 1


def test_frames_come_one_by_one_with_their_numbers(dicom: MakeDicom) -> None:
    volume = np.arange(5, dtype=np.uint8)[:, None, None].repeat(16, 1).repeat(16, 2)
    data = dicom(volume, frames=5)

    frames = frames_of(data, rendering=Rendering(size=16, frames=2))

    assert [(frame.number, int(frame.pixels[0, 0])) for frame in frames] == [(2, 1), (4, 3)]


def test_each_frame_of_an_enhanced_object_has_its_own_window(dicom: MakeDicom) -> None:
    def add_groups(data: Dataset) -> None:
        data.PerFrameFunctionalGroupsSequence = [_groups(0, 100), _groups(100, 100)]
        shared = Dataset()
        shared.PixelValueTransformationSequence = [Dataset()]
        shared.PixelValueTransformationSequence[0].RescaleSlope = "1"
        shared.PixelValueTransformationSequence[0].RescaleIntercept = "50"
        data.SharedFunctionalGroupsSequence = [shared]

    volume = np.full((2, 16, 16), 50, np.uint16)
    frames = frames_of(dicom(volume, frames=2, prepare=add_groups))

    assert [int(frame.pixels[0, 0]) for frame in frames] == [255, 128]
    assert [frame.rendered.low for frame in frames] == [-50, 50]


def _groups(centre: int, width: int) -> Dataset:
    window = Dataset()
    window.WindowCenter, window.WindowWidth = str(centre), str(width)
    window.VOILUTFunction = "LINEAR_EXACT"
    groups = Dataset()
    groups.FrameVOILUTSequence = [window]
    return groups


def test_a_large_multi_frame_file_is_read_a_frame_at_a_time(
    dicom: MakeDicom, tmp_path: Path
) -> None:
    frame = np.arange(1 << 20, dtype=np.uint16).reshape(1024, 1024) >> 4
    head, count = dicom(frame, frames=48), 48
    path = tmp_path / "large.dcm"
    at = len(head) - frame.nbytes
    with path.open("wb") as file:
        file.write(head[: at - 4] + struct.pack("<I", frame.nbytes * count))
        for _ in range(count):
            file.write(frame.tobytes())

    tracemalloc.start()
    frames = sum(1 for _ in decode(path, rendering=SMALL))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert frames == count
    assert peak < 12 * frame.nbytes  # of 48
