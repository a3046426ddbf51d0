"""Stored attributes of a header, and borders in both polarities."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import uid

from medspark.images.decode import decode
from medspark.images.deidentify import Pseudonyms
from medspark.images.frame import Frame
from medspark.images.rendering import Rendering

MakeDicom = Callable[..., bytes]
DAY = date(2020, 5, 17)


def _frame(data: bytes, **settings: Any) -> Frame:
    return next(decode(data, rendering=Rendering(size=16, **settings)))


@pytest.mark.parametrize(
    "keyword", ["PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"]
)
@given(rows=st.floats(0.05, 4), columns=st.floats(0.05, 4))
def test_spacing_is_kept_row_before_column(
    dicom: MakeDicom, keyword: str, rows: float, columns: float
) -> None:
    said = [f"{rows:.4f}", f"{columns:.4f}"]

    kept = _frame(dicom(np.zeros((8, 8), np.uint8), **{keyword: said})).attributes

    assert (kept.row_spacing_mm, kept.column_spacing_mm) == pytest.approx(
        (rows, columns), rel=0.1, abs=2e-3
    )
    assert kept.spacing_source == keyword


def test_the_spacing_of_the_patient_comes_before_that_of_the_detector(dicom: MakeDicom) -> None:
    data = dicom(
        np.zeros((8, 8), np.uint8), PixelSpacing=["0.2", "0.3"], ImagerPixelSpacing=["0.5", "0.6"]
    )

    assert _frame(data).attributes.spacing_source == "PixelSpacing"


@pytest.mark.parametrize(("rows", "columns"), [("0.2", "0.4"), ("0.4", "0.2")])
def test_pixels_that_are_high_give_an_image_that_is_high(
    dicom: MakeDicom, rows: str, columns: str
) -> None:
    data = dicom(np.zeros((8, 8), np.uint8), PixelSpacing=[rows, columns])

    shown = _frame(data, keep_aspect=True).rendered

    assert (shown.content_rows > shown.content_columns) == (rows > columns)
    assert max(shown.content_rows, shown.content_columns) == 16
    assert min(shown.content_rows, shown.content_columns) == 8


def _shift(key: bytes, patient: str, day: date = DAY) -> int:
    return Pseudonyms(key * 32).relative_day(patient, day) - day.toordinal()


@given(key=st.binary(min_size=1, max_size=1))
def test_days_move_by_up_to_a_year_both_ways(key: bytes) -> None:
    shifts = [_shift(key, f"patient {number}") for number in range(500)]

    assert -365 <= min(shifts) < -330
    assert 330 < max(shifts) <= 365
    assert abs(np.mean(shifts)) < 60  # of 500 uniform ones: six standard errors


@given(first=st.dates(date(1950, 1, 1), date(2090, 1, 1)), days=st.integers(0, 9000))
def test_distances_between_the_days_of_one_patient_are_kept(first: date, days: int) -> None:
    later = date.fromordinal(first.toordinal() + days)
    pseudonyms = Pseudonyms(b"k" * 32)

    moved = [pseudonyms.relative_day("one", day) for day in (first, later)]

    assert moved[1] - moved[0] == days


@pytest.mark.parametrize("inverted", [True, False])
@pytest.mark.parametrize("window", ["full", "percentile"])
@given(rows=st.integers(3, 40), columns=st.integers(3, 40), seed=st.integers(0, 99))
def test_borders_are_black_whatever_the_polarity(
    dicom: MakeDicom, inverted: bool, window: str, rows: int, columns: int, seed: int
) -> None:
    stored = np.random.default_rng(seed).integers(0, 256, (rows, columns), dtype=np.uint8)
    data = dicom(stored, PhotometricInterpretation=f"MONOCHROME{1 if inverted else 2}")

    frame = _frame(data, keep_aspect=True, window=window)

    box = frame.rendered
    border = np.ones_like(frame.pixels, dtype=bool)
    border[box.top : box.top + box.content_rows, box.left : box.left + box.content_columns] = False
    assert not frame.pixels[border].any()
    assert box.inverted == inverted


def test_the_depth_and_the_syntax_are_those_of_the_file(dicom: MakeDicom) -> None:
    kept = _frame(dicom(np.zeros((8, 9), np.int16), BitsStored=12)).attributes

    assert (kept.rows, kept.columns, kept.bits_stored, kept.signed) == (8, 9, 12, True)
    assert kept.transfer_syntax == uid.ExplicitVRLittleEndian
