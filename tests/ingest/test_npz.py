"""Archives of arrays: sizes and headers are checked before anything is unpacked."""

from __future__ import annotations

import io
import os
import struct
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medspark.errors import UsageError
from medspark.images.reasons import Unreadable
from medspark.ingest.config import ArchiveLimits
from medspark.ingest.npz import has_findings, list_images, read_image

LIMITS = ArchiveLimits()


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def header(text: str, version: int = 1) -> bytes:
    """Return the .npy header whose description of the array is ``text``."""
    length = struct.pack("<H" if version == 1 else "<I", len(text) + 1)
    return b"\x93NUMPY" + bytes([version, 0]) + length + text.encode() + b"\n"


def images(count: int = 3, side: int = 4) -> np.ndarray:
    return np.arange(count * side * side, dtype=np.uint8).reshape(count, side, side)


def archive(path: Path, compression: int = zipfile.ZIP_STORED, **members: bytes) -> str:
    """Write an archive of three images and their labels; ``members`` replace its members."""
    whole = {"train_images": npy(images()), "train_labels": npy(np.arange(3)[:, None])} | members
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in whole.items():
            file.writestr(f"{name}.npy", content)
    return str(path)


def refusal(source: str, limits: ArchiveLimits = LIMITS) -> str:
    with pytest.raises(UsageError) as raised:
        list_images(source, limits)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def pixels(source: str, path: str, *, run: str = "1") -> np.ndarray:
    content = read_image(source, path, run=run, limits=LIMITS)
    return np.asarray(Image.open(io.BytesIO(content)))


def test_an_archive_lists_every_image_of_every_split(tmp_path: Path):
    labels = {"val_labels": npy(np.array([7])), "val_images": npy(images(1))}

    rows = list_images(archive(tmp_path / "a.npz", **labels), LIMITS).to_pylist()

    assert [(row["path"], row["label"], row["split"]) for row in rows] == [
        *[(f"train/{n}", str(n), "train") for n in range(3)], ("val/0", "7", "val"),
    ]  # fmt: skip
    assert {row["size"] for row in rows} == {16}


def test_other_pixels_are_another_state_of_the_same_images(tmp_path: Path):
    one = list_images(archive(tmp_path / "a.npz"), LIMITS)["modified"].to_pylist()
    same = list_images(archive(tmp_path / "b.npz"), LIMITS)["modified"].to_pylist()
    other = archive(tmp_path / "c.npz", train_images=npy(255 - images()))

    assert one == same
    assert not set(one) & set(list_images(other, LIMITS)["modified"].to_pylist())


def test_a_split_may_be_empty(tmp_path: Path):
    none = {"val_images": npy(images(0)), "val_labels": npy(np.empty((0, 1), np.uint8))}

    assert len(list_images(archive(tmp_path / "a.npz", **none), LIMITS)) == 3


def test_a_worker_that_is_used_again_sees_the_archive_as_it_is_now(tmp_path: Path):
    source = archive(tmp_path / "a.npz")
    before, status = pixels(source, "train/1"), os.stat(source)

    archive(tmp_path / "a.npz", train_images=npy(255 - images()))
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))

    assert os.stat(source).st_size == status.st_size
    assert np.array_equal(pixels(source, "train/1", run="2"), 255 - before)


@pytest.mark.parametrize("bound", [0, -1])
def test_the_limits_of_an_archive_are_what_it_may_just_reach(tmp_path: Path, bound: int):
    source = archive(tmp_path / "a.npz", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(source) as file:
        unpacked = sum(member.file_size for member in file.infolist())
    for key, value, said in (
        ("npz_arrays", 2, "2 arrays, limit 1"),
        ("npz_images", 3, "3 images, limit 2"),
        ("npz_bytes", unpacked, f"{unpacked} bytes unpacked, limit {unpacked - 1}"),
        ("frame_pixels", 16, "4 x 4 pixels, limit 15"),
    ):
        limits = LIMITS.model_copy(update={key: value + bound})
        if bound:
            assert said in refusal(source, limits)
        else:
            assert len(list_images(source, limits)) == 3


def test_images_of_all_splits_count_together(tmp_path: Path):
    more = {"val_images": npy(images(2)), "val_labels": npy(np.arange(2))}
    source = archive(tmp_path / "a.npz", **more)

    assert "5 images, limit 4" in refusal(source, ArchiveLimits(npz_images=4))


ONES = "{'descr': '|u1', 'fortran_order': False, 'shape': (%s), }"
LIES = {
    "more images than bytes": header(ONES % "10000000000, 28, 28") + bytes(100),
    "fewer pixels than bytes": header(ONES % "3, 4, 4") + bytes(100),
    "more pixels than bytes": header(ONES % "3, 400, 400") + bytes(48),
    "less than nothing": header(ONES % "3, -4, -4") + bytes(48),
    "a header of 4 GB": b"\x93NUMPY\x02\x00\xf0\xff\xff\xff" + b" " * 50_000,
    "code in place of a header": header("__import__('os').abort()"),
    "a very deep header": header("(" * 9_000),
    "a header that negates": header("-" * 9_000 + "1"),
    "a type without its parts": header("{'descr': ('a',), 'fortran_order': False, 'shape': (3,)}"),
    "no array": b"",
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("name", ["train_images", "train_labels"])
def test_an_array_that_lies_about_itself_is_refused_at_once(tmp_path: Path, lie: str, name: str):
    source, began = archive(tmp_path / "a.npz", **{name: LIES[lie]}), time.process_time()

    assert "is not a whole MedMNIST archive" in refusal(source)
    assert time.process_time() - began < 10


class _Mine:
    unpickled = False

    def __setstate__(self, state: object) -> None:
        _Mine.unpickled = True

    def __getstate__(self) -> int:
        return 1


@pytest.mark.parametrize("name", ["train_images", "train_labels"])
def test_an_array_of_objects_is_refused_and_never_unpickled(tmp_path: Path, name: str):
    hostile = np.array([_Mine(), _Mine(), _Mine()], dtype=object)

    assert "is not a whole MedMNIST archive" in refusal(
        archive(tmp_path / "a.npz", **{name: npy(hostile)})
    )
    assert not _Mine.unpickled


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"train_labels": npy(np.arange(4))}, "not have one row of labels per image"),
        ({"train_labels": npy(np.zeros((3, 1, 1)))}, "not have one row of labels per image"),
        ({"train_labels": npy(np.zeros(3, "V4"))}, "neither numbers nor text"),
        ({"train_labels": npy(np.zeros(3, "U30000000"))}, "labels have more than"),
        ({"train_images": npy(images().astype("u2"))}, "not 8-bit"),
        ({"train_images": npy(np.zeros((3, 4, 4, 2), "u1"))}, "not 8-bit"),
        ({"train_images": npy(np.zeros((3, 4, 4, 3, 1), "u1"))}, "not 8-bit"),
        ({"train_images": npy(np.zeros((3, 0, 4), "u1"))}, "columns or frames are zero"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path: Path, members: dict[str, bytes], said: str):
    compressed = archive(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, **members)

    assert said in refusal(compressed, ArchiveLimits(expansion=2000))


def test_an_array_that_expands_beyond_reason_is_refused(tmp_path: Path):
    bomb = {"train_images": npy(np.zeros((1 << 15, 50, 50), "u1"))}

    said = refusal(archive(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, **bomb))

    assert "bytes claim to hold" in said


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_numpy_does_not_write_is_refused(tmp_path: Path, compression: int):
    assert "a compression method that numpy does not write" in refusal(
        archive(tmp_path / "a.npz", compression)
    )


def test_a_list_of_a_million_arrays_is_not_read(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        for number in range(14_000):
            file.writestr(f"{number:>40}", b"")

    assert "its list of arrays is too long" in refusal(str(tmp_path / "a.npz"))


@given(st.data())
def test_whatever_is_damaged_ends_in_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    path = tmp_path_factory.mktemp("damaged") / "a.npz"
    whole = Path(archive(path, zipfile.ZIP_DEFLATED)).read_bytes()
    spoilt = bytearray(whole[: data.draw(st.integers(0, 2 * len(whole)))])
    for _ in range(data.draw(st.integers(0, 4)) if spoilt else 0):
        spoilt[data.draw(st.integers(0, len(spoilt) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(spoilt)

    with warnings.catch_warnings(action="ignore"):  # numpy's, about headers of Python 2
        try:
            for row in list_images(str(path), LIMITS).to_pylist():
                read_image(str(path), row["path"], run="1", limits=LIMITS)
            has_findings(str(path), LIMITS)
        except (UsageError, Unreadable) as error:
            said = str(error)
        else:
            said = ""

    assert "\n" not in said


def test_pixels_that_are_damaged_are_looked_for_once(tmp_path: Path, monkeypatch: Any):
    large = images(3, side=200)
    source = archive(tmp_path / "a.npz", train_images=npy(large))
    content = bytearray(Path(source).read_bytes())
    content[content.index(large.tobytes()) + large.size - 1] ^= 1
    Path(source).write_bytes(content)

    assert len(list_images(source, LIMITS)) == 3
    for index in range(3):
        with pytest.raises(Unreadable, match="Bad CRC"):
            pixels(source, f"train/{index}")
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(Unreadable, match="Bad CRC"):
        pixels(source, "train/1")


def test_a_file_that_is_no_archive_is_named(tmp_path: Path):
    (tmp_path / "a.npz").write_bytes(b"PK")
    np.savez(tmp_path / "b.npz", x=np.zeros(3))

    assert "a.npz is not a whole MedMNIST archive" in refusal(str(tmp_path / "a.npz"))
    assert "it has no train_images" in refusal(str(tmp_path / "b.npz"))
    assert "There is no source" in refusal(str(tmp_path / "c.npz"))
