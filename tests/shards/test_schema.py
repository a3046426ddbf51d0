"""The layout of a shard: any Parquet reader opens it, and medspark maps it without decoding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_shards import mask_of
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medspark.errors import UsageError
from medspark.shards.schema import (
    MOST_FINDINGS,
    PixelFormat,
    findings_of,
    map_pixels,
    read_labels,
    read_patients,
    read_sites,
    write_shard,
)


def images(count: int, pixel_format: PixelFormat) -> np.ndarray:
    generator = np.random.default_rng(count)
    top = 2**pixel_format.bits
    return generator.integers(0, top, (count, *pixel_format.shape)).astype(pixel_format.dtype)


def site_of(row: int) -> str | None:
    return (None, "north", "south")[row % 3]


def tables(pixels: np.ndarray, pixel_format: PixelFormat, cut: int) -> Iterator[pa.Table]:
    for start in range(0, len(pixels), cut):
        part = pixels[start : start + cut]
        names = [str(start + i) for i in range(len(part))]
        columns = [
            names,
            names,
            pa.array([site_of(int(name)) for name in names], pa.string()),
            pa.array(range(start, start + len(part)), pa.int32()),
            pa.array([image.tobytes() for image in part], pa.binary(pixel_format.nbytes)),
        ]
        yield pa.table(columns, schema=pixel_format.schema)


@pytest.mark.parametrize(
    "pixel_format", [PixelFormat(8, 6, 1, 8), PixelFormat(5, 7, 3, 16)], ids=str
)
@pytest.mark.parametrize("cut", [1, 7, 100])
def test_mapped_pixels_are_those_that_were_written(
    pixel_format: PixelFormat, cut: int, tmp_path: Path
):
    pixels = images(50, pixel_format)

    rows = write_shard(
        tmp_path / "s.parquet", tables(pixels, pixel_format, cut), pixel_format, rows_per_group=16
    )
    views = map_pixels(tmp_path / "s.parquet", pixel_format)

    assert rows == 50
    assert [len(view) for view in views] == [16, 16, 16, 2]
    assert np.array_equal(np.concatenate(views), pixels)
    assert np.array_equal(read_labels(tmp_path / "s.parquet"), np.arange(50))


def test_an_ordinary_parquet_reader_sees_the_same_pixels(tmp_path: Path):
    pixel_format = PixelFormat(4, 4, 1, 8)
    pixels = images(10, pixel_format)
    write_shard(
        tmp_path / "s.parquet", tables(pixels, pixel_format, 10), pixel_format, rows_per_group=4
    )

    read = pq.read_table(tmp_path / "s.parquet")["pixels"].to_pylist()

    assert read == [image.tobytes() for image in pixels]


def test_patients_sites_and_labels_come_in_the_order_of_the_rows(tmp_path: Path):
    pixel_format = PixelFormat(4, 4, 1, 8)
    path = tmp_path / "s.parquet"
    write_shard(path, tables(images(9, pixel_format), pixel_format, 4), pixel_format,
                rows_per_group=4)  # fmt: skip

    assert read_patients(path).tolist() == [str(number) for number in range(9)]
    assert read_sites(path).tolist() == [site_of(row) or "" for row in range(9)]
    assert read_labels(path).tolist() == list(range(9))


def test_no_column_of_a_shard_but_the_site_may_lack_a_value(tmp_path: Path):
    pixel_format = PixelFormat(4, 4, 1, 8)
    (table,) = tables(images(2, pixel_format), pixel_format, 2)

    for name in set(table.schema.names) - {"site"}:
        place, kind = table.schema.get_field_index(name), table.schema.field(name).type
        gap = table.set_column(place, name, pa.nulls(2, kind))
        with pytest.raises((ValueError, pa.ArrowException)):
            write_shard(tmp_path / "s", [gap], pixel_format, rows_per_group=2)


@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 3]), st.sampled_from([8, 16]))
def test_a_format_says_what_its_images_take(height, width, channels, bits):
    pixel_format = PixelFormat(height, width, channels, bits)

    image = np.zeros(pixel_format.shape, pixel_format.dtype)

    assert image.shape == (height, width, channels)
    assert image.nbytes == pixel_format.nbytes
    assert image.itemsize * 8 == bits
    assert np.array(2, pixel_format.dtype).tobytes() == b"\x02\x00"[: bits // 8]


def test_mapping_copies_nothing(tmp_path: Path):
    pixel_format = PixelFormat(4, 4, 1, 8)
    write_shard(
        tmp_path / "s.parquet",
        tables(images(8, pixel_format), pixel_format, 8),
        pixel_format,
        rows_per_group=8,
    )

    (view,) = map_pixels(tmp_path / "s.parquet", pixel_format)

    assert not view.flags.owndata
    assert not view.flags.writeable


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zstd", "use_dictionary": False},
        {"compression": "none", "use_dictionary": False, "data_page_size": 16},
        {"compression": "none"},
    ],
)
def test_a_parquet_file_of_another_layout_is_refused_by_name(tmp_path: Path, options: dict):
    pixel_format = PixelFormat(4, 4, 1, 8)
    (table,) = tables(images(200, pixel_format), pixel_format, 200)
    pq.write_table(table, tmp_path / "other.parquet", write_batch_size=4, **options)

    with pytest.raises(
        UsageError, match=r"other\.parquet does not have the layout of a training shard"
    ):
        map_pixels(tmp_path / "other.parquet", pixel_format)


def test_a_file_without_pixels_is_refused_by_name(tmp_path: Path):
    pq.write_table(pa.table({"label": [1]}), tmp_path / "other.parquet")

    with pytest.raises(UsageError, match=r"other\.parquet is not a training shard"):
        map_pixels(tmp_path / "other.parquet", PixelFormat(4, 4, 1, 8))


def test_an_empty_shard_has_no_pixels(tmp_path: Path):
    pixel_format = PixelFormat(4, 4, 1, 8)
    write_shard(tmp_path / "s.parquet", [], pixel_format, rows_per_group=8)

    assert map_pixels(tmp_path / "s.parquet", pixel_format) == []


@given(
    st.integers(1, MOST_FINDINGS).flatmap(
        lambda k: arrays("f4", (3, k), elements=st.integers(0, 1))
    )
)
def test_findings_survive_as_a_mask_and_bit_k_is_finding_k(findings):
    masks = mask_of(findings)

    assert masks.dtype == np.int32
    assert masks.tolist() == [sum(int(f) << k for k, f in enumerate(row)) for row in findings]
    assert np.array_equal(findings_of(masks, findings.shape[1]), findings)
