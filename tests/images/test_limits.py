"""Limits of one file, exact to the byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.images.limits import Limits
from medspark.images.reasons import Reason, Unreadable

MIB64 = 1 << 26


def refused(check: str, *values: int, **limits: float) -> Reason | None:
    try:
        getattr(Limits.model_validate(limits), check)(*values)
    except Unreadable as unreadable:
        return unreadable.reason
    return None


@given(
    compressed=st.integers(1, 1 << 24), decoded=st.integers(1, 1 << 33), ratio=st.integers(1, 1000)
)
def test_a_bomb_is_large_and_expands_beyond_the_ratio(
    compressed: int, decoded: int, ratio: int
) -> None:
    bomb = decoded > MIB64 and decoded / compressed > ratio

    found = refused("check_expansion", compressed, decoded, expansion=ratio)

    assert found is (Reason.DECOMPRESSION_BOMB if bomb else None)


@pytest.mark.parametrize("ratio", [1, 7, 200])
def test_the_ratio_itself_is_honest_and_a_byte_more_is_not(ratio: int) -> None:
    size = MIB64 // ratio + 1

    assert refused("check_expansion", size, size * ratio, expansion=ratio) is None
    assert refused("check_expansion", size, size * ratio + 1, expansion=ratio) is not None


def test_a_large_mammogram_in_a_tenth_of_its_bytes_is_honest() -> None:
    decoded = 4096 * 5120 * 2 * 4

    assert refused("check_expansion", decoded // 10, decoded) is None


@pytest.mark.parametrize(
    ("check", "limit", "values"),
    [
        ("check_file", "file_bytes", (100,)),
        ("check_output", "output_bytes", (100,)),
        ("check_frame", "frame_pixels", (4, 25)),
        ("check_frame", "frames", (1, 1, 100)),
    ],
)
def test_a_limit_is_the_largest_that_passes(
    check: str, limit: str, values: tuple[int, ...]
) -> None:
    assert refused(check, *values, **{limit: 100}) is None
    assert refused(check, *values, **{limit: 99}) is Reason.TOO_LARGE


@pytest.mark.parametrize("at", [0, 1, 2])
def test_no_dimension_is_zero(at: int) -> None:
    values = [5, 5, 5]
    values[at] = 0

    assert refused("check_frame", *values) is Reason.INCONSISTENT_HEADER


def test_an_empty_file_is_told_from_a_large_one() -> None:
    assert refused("check_file", 0) is Reason.EMPTY_FILE
