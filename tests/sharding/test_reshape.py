"""Tasks that make shards: they read the right rows, in one format, and check the parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.errors import RunError
from medspark.files import sha256_of
from medspark.sharding.layout import Counts, Layout
from medspark.sharding.reshape import ReadSamples, WriteShards, bring_to
from medspark.shards.schema import PixelFormat, map_pixels, read_labels

SMALL = PixelFormat(2, 2, 1, 8)


def sample(values: Any, bits: int = 8) -> dict[str, Any]:
    pixels = np.asarray(values, f"<u{bits // 8}")
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    height, width, channels = pixels.shape
    size = {"height": height, "width": width, "channels": channels, "bits": bits}
    return size | {"pixels": pixels.tobytes()}


def test_every_deep_value_becomes_the_nearest_shallow_one():
    values = np.arange(1 << 16).reshape(256, 256)

    found = np.frombuffer(bring_to(PixelFormat(256, 256, 1, 8), sample(values, bits=16)), "u1")

    assert np.array_equal(found, np.rint(values.ravel() / 257))


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_grey_is_the_luma_of_a_colour(colour):
    (found,) = bring_to(PixelFormat(1, 1, 1, 8), sample([[colour]]))

    assert abs(found - (0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2])) <= 0.5


def test_colour_of_a_grey_value_is_that_value_three_times():
    found = bring_to(PixelFormat(1, 2, 3, 8), sample([[7, 9]]))

    assert list(found) == [7, 7, 7, 9, 9, 9]


def test_a_resized_image_keeps_its_orientation_and_depth():
    values = np.full((4, 4), 1000)
    values[:2, 2:] = 60_000

    found = np.frombuffer(bring_to(PixelFormat(2, 2, 1, 16), sample(values, bits=16)), "<u2")

    assert found[1] > 2 * max(found[0], found[2], found[3])
    assert found[1] > 30_000


SITES = ("north", None)


def write_part(folder: Path) -> dict[str, tuple[int, str]]:
    """Write twelve samples in row groups of five; sample n has pixels of n."""
    rows = [sample(np.full((2, 2), n)) | {"sample_key": f"k{n}"} for n in range(12)]
    path = folder / "part.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    return {"part.parquet": (path.stat().st_size, sha256_of(path))}


def asked_for(*rows: int, **values: Any) -> list[pa.RecordBatch]:
    told = [
        {"bucket": n % 2, "position": 100 + n, "sample_key": f"k{n}", "patient_key": f"p{n}",
         "site": SITES[n % 2], "number": n % 3, "part": "part.parquet", "row": n} | values
        for n in rows
    ]  # fmt: skip
    return [pa.RecordBatch.from_pylist([row]) for row in told]


@given(rows=st.sets(st.integers(0, 11)))
def test_the_rows_that_are_asked_for_are_read_and_no_others(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("read")
    read = ReadSamples(str(folder), write_part(folder), SMALL)

    found = [row for batch in read(asked_for(*sorted(rows))) for row in batch.to_pylist()]

    assert found == [
        {"bucket": n % 2, "position": 100 + n, "sample_key": f"k{n}", "patient_key": f"p{n}",
         "site": SITES[n % 2], "label": n % 3, "pixels": bytes([n] * 4)}
        for n in sorted(rows)
    ]  # fmt: skip


def test_a_part_that_is_not_what_the_manifest_or_the_ledger_says_is_named(tmp_path):
    part = write_part(tmp_path)
    ((name, (size, sha256)),) = part.items()
    for told, rows, said in (
        ((size + 1, sha256), asked_for(1), "missing or has another size"),
        ((size - 1, sha256), asked_for(1), "missing or has another size"),
        ((size, sha256[::-1]), asked_for(1), "has been damaged"),
        ((size, sha256), asked_for(1, sample_key="k2"), "does not match the ledger"),
    ):
        with pytest.raises(RunError, match=said):
            list(ReadSamples(str(tmp_path), {name: told}, SMALL)(rows))
    (tmp_path / name).unlink()
    with pytest.raises(RunError, match="missing"):
        list(ReadSamples(str(tmp_path), part, SMALL)(asked_for(1)))


def placed(numbers: list[tuple[int, int]], pixels: int = 4) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(
        {
            "bucket": pa.array([bucket for bucket, _ in numbers], pa.int32()),
            "position": pa.array([n for _, n in numbers], pa.int64()),
            "sample_key": [f"k{n}" for _, n in numbers],
            "patient_key": [f"p{n}" for _, n in numbers],
            "site": [SITES[n % 2] for _, n in numbers],
            "label": pa.array([n % 3 for _, n in numbers], pa.int32()),
            "pixels": pa.array([bytes([n] * pixels) for _, n in numbers], pa.binary()),
        }
    )


def test_shards_hold_their_rows_in_order_however_these_are_cut_into_batches(tmp_path):
    counts = {"train": Counts(8, (8,), 1), "val": Counts(2, (2,), 1), "test": Counts(1, (1,), 1)}
    layout = Layout.of(counts, SMALL, shard_bytes=4 * 4)
    numbers = [(layout.bucket("train", n), n) for n in range(8)] + [(2, 20), (2, 21), (3, 30)]
    write = WriteShards(str(tmp_path), "g", layout, SMALL, rows_per_group=3)

    for cut in (1, 3, 20):
        batches = [placed(numbers[start : start + cut]) for start in range(0, 11, cut)]
        found = [row for batch in write(batches) for row in batch.to_pylist()]

        assert [(row["bucket"], row["rows"]) for row in found] == [(0, 4), (1, 4), (2, 2), (3, 1)]
        for row in found:
            path, mine = tmp_path / row["path"], [n for b, n in numbers if b == row["bucket"]]
            assert (row["bytes"], row["sha256"]) == (path.stat().st_size, sha256_of(path))
            mapped = np.concatenate(map_pixels(path, SMALL))
            assert mapped[:, 0, 0, 0].tolist() == mine
            assert read_labels(path).tolist() == [n % 3 for n in mine]
    names = {path.name for path in (tmp_path / "data" / "g").iterdir()}
    assert names == {"train-00000.parquet", "train-00001.parquet", "val-00000.parquet",
                     "test-00000.parquet"}  # fmt: skip


@pytest.mark.parametrize("pixels", [3, 5])
def test_pixels_of_another_size_are_not_written(tmp_path, pixels):
    layout = Layout.of({"train": Counts(1, (1,), 1)}, SMALL, shard_bytes=16)
    write = WriteShards(str(tmp_path), "g", layout, SMALL, rows_per_group=3)

    with pytest.raises(RunError, match="does not have the 4 bytes"):
        list(write([placed([(0, 1)], pixels=pixels)]))
