"""Grey values to pixels, against the standard's formulas and pydicom's own pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_modality_lut, apply_windowing

from medspark.images.rendering import (
    Grey,
    Rendering,
    Table,
    Voi,
    render_colour,
    render_grey,
    resize,
)

SAME_SIZE = Rendering(size=64)


def column(values: list[float], dtype: Any = np.uint16) -> npt.NDArray[Any]:
    """Return ``values`` as one column of a square image."""
    return np.repeat(np.array(values, dtype)[:, None], len(values), axis=1)


def shown(values: list[float], grey: Grey, dtype: Any = np.uint16, **settings: Any) -> list[int]:
    rendering = Rendering(size=len(values), **settings)
    pixels, _ = render_grey(column(values, dtype), grey, rendering)
    return [int(value) for value in pixels[:, 0]]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        # PS3.3 C.11.2.1.2.1: black up to c - w/2, white above c - 1 + w/2
        ("LINEAR", [0, 0, 0, 65535 * 50 / 99, 65535, 65535]),
        # PS3.3 C.11.2.1.3.2: black up to c - w/2, white above c + w/2
        ("LINEAR_EXACT", [0, 0, 0, 65535 * 0.5, 65535 * 0.99, 65535]),
    ],
)
def test_a_window_is_the_formula_of_the_standard(function: str, expected: list[float]) -> None:
    values = [0, 949, 950, 1000, 1049, 1050]

    got = shown(values, Grey(16, voi=Voi(1000, 100, function)), bits=16)

    assert np.allclose(got, expected, atol=1)


def test_a_window_of_width_one_is_a_threshold() -> None:
    assert shown([6, 7, 8, 9], Grey(16, voi=Voi(8, 1))) == [0, 0, 255, 255]


def test_a_sigmoid_is_half_at_its_centre_and_never_clips_within_its_width() -> None:
    got = shown([0, 900, 1000, 1100], Grey(16, voi=Voi(1000, 400, "SIGMOID")), bits=16)

    assert got[2] == 32768
    assert np.allclose(got[1::2], [65535 / (1 + np.e), 65535 * np.e / (1 + np.e)], atol=1)


@given(
    centre=st.floats(-2000, 3000),
    width=st.floats(1, 5000),
    slope=st.floats(0.01, 4),  # pydicom mistakes black for white where it is negative
    intercept=st.floats(-2000, 2000),
    function=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
)
def test_the_grey_pipeline_agrees_with_pydicom(
    centre: float, width: float, slope: float, intercept: float, function: str
) -> None:
    stored = np.arange(-2048, 2048, dtype=np.int16).reshape(64, 64)
    data = Dataset()
    data.RescaleSlope, data.RescaleIntercept = f"{slope:.8g}", f"{intercept:.8g}"
    data.WindowCenter, data.WindowWidth = f"{centre:.8g}", f"{max(width, 1.01):.8g}"
    data.VOILUTFunction, data.PhotometricInterpretation = function, "MONOCHROME2"
    data.BitsStored, data.PixelRepresentation = 12, 1
    with np.errstate(over="ignore"):
        in_output = apply_windowing(apply_modality_lut(stored, data), data)
    # pydicom's output range is that of the modality values; PS3.3 does not define it.
    ends = sorted(
        float(data.RescaleSlope) * v + float(data.RescaleIntercept) for v in (-2048, 2047)
    )
    expected = (in_output - ends[0]) / (ends[1] - ends[0]) * 255
    voi = Voi(float(data.WindowCenter), float(data.WindowWidth), function)
    grey = Grey(12, True, float(data.RescaleSlope), float(data.RescaleIntercept), voi=voi)

    pixels, _ = render_grey(stored, grey, SAME_SIZE)

    assert np.abs(pixels - expected).max() <= 0.51


def test_the_window_is_in_modality_units_not_in_stored_ones() -> None:
    grey = Grey(16, slope=2, intercept=-1000, voi=Voi(0, 200, "LINEAR_EXACT"))

    assert shown([450, 500, 550, 600], grey) == [0, 128, 255, 255]


def test_monochrome1_is_inverted_after_the_window() -> None:
    voi = Voi(50, 100, "LINEAR_EXACT")

    assert shown([0, 25, 75, 100], Grey(16, voi=voi, inverted=True)) == [255, 191, 64, 0]
    assert shown([0, 25, 75, 900], Grey(16, voi=voi, inverted=True)) == [255, 191, 64, 0]


@pytest.mark.parametrize("inverted", [False, True])
def test_padding_is_black_whatever_the_polarity(inverted: bool) -> None:
    grey = Grey(16, voi=Voi(50, 100), padding=(0, 1), inverted=inverted)

    got = shown([0, 1, 99, 50], grey)

    assert got[:2] == [0, 0]
    assert got[3] > 100


def test_padding_does_not_move_the_percentiles() -> None:
    stored = np.random.default_rng(0).integers(1000, 2000, (64, 64)).astype(np.uint16)
    padded = stored.copy()
    padded[:, :20] = 65535

    _, window = render_grey(stored[:, 20:], Grey(16), Rendering(size=44, window="percentile"))
    _, around = render_grey(padded, Grey(16, padding=(65535, 65535)), Rendering(size=44))

    assert (window.low, window.high) == (around.low, around.high)


def test_a_modality_table_comes_before_a_voi_table() -> None:
    modality = Table(10, np.array([0.0, 1, 2, 3]), 8)
    voi = Table(0, np.array([0.0, 51, 102, 255]), 8)

    got = shown([9, 10, 11, 12, 13, 14], Grey(8, modality_lut=modality, voi_lut=voi))

    assert got == [0, 0, 51, 102, 255, 255]


@pytest.mark.parametrize(("hounsfield", "used"), [(True, "lung"), (False, "dicom_window")])
def test_a_preset_applies_to_ct_only(hounsfield: bool, used: str) -> None:
    grey = Grey(16, True, intercept=-1024, voi=Voi(40, 400), hounsfield=hounsfield)

    _, rendered = render_grey(column([0] * 8, np.int16), grey, Rendering(size=8, window="lung"))

    assert rendered.window == used


def test_eight_bits_without_a_window_stay_as_they_are() -> None:
    stored = np.arange(0, 256, 4, dtype=np.uint8).repeat(64).reshape(64, 64)

    pixels, rendered = render_grey(stored, Grey(8), SAME_SIZE)

    assert np.array_equal(pixels, stored)
    assert rendered.window == "full"


def test_wider_values_without_a_window_take_percentiles(ramp: npt.NDArray[np.uint16]) -> None:
    pixels, rendered = render_grey(ramp, Grey(16), SAME_SIZE)

    assert rendered.window == "percentile"
    assert (rendered.low, rendered.high) == pytest.approx((20.5, 4074.5), abs=1)
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_a_constant_image_is_black() -> None:
    assert shown([7, 7, 7, 7], Grey(16)) == [0] * 4


def test_percentiles_of_a_large_image_are_close_to_those_of_all_its_pixels() -> None:
    rng = np.random.default_rng(0)
    stored = np.clip(rng.normal(20000, 4000, (1024, 1024)), 0, 65535).astype(np.uint16)

    _, rendered = render_grey(stored, Grey(16), SAME_SIZE)

    exact = np.percentile(stored, (0.5, 99.5))
    width = exact[1] - exact[0]
    assert np.abs(np.array([rendered.low, rendered.high]) - exact).max() < 0.01 * width


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.float32, np.float64])
def test_wide_and_floating_values_are_rendered_alike(dtype: Any) -> None:
    values = [0, 100, 5000, 10000]

    assert shown(values, Grey(32, voi=Voi(5000, 10000, "LINEAR_EXACT")), dtype) == [0, 3, 128, 255]


def test_not_a_number_does_not_spoil_an_image() -> None:
    got = shown([np.nan, 0, 10, 20], Grey(32, voi=Voi(10, 20, "LINEAR_EXACT")), np.float32)

    assert got[1:] == [0, 128, 255]


def test_sixteen_bit_pixels_are_the_finer_version_of_eight_bit_ones(
    ramp: npt.NDArray[np.uint16],
) -> None:
    grey = Grey(16, voi=Voi(2048, 4096))

    coarse, _ = render_grey(ramp, grey, Rendering(size=32))
    fine, _ = render_grey(ramp, grey, Rendering(size=32, bits=16))

    assert fine.dtype == np.uint16
    assert np.abs(fine / 257 - coarse).max() <= 1


def _textured(side: int) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.normal(0, 1, (9, 9)).astype(np.float32)).resize((side, side))
    return np.clip(np.asarray(smooth) * 50 + 128 + rng.normal(0, 12, (side, side)), 0, 255).astype(
        np.uint8
    )


@pytest.mark.parametrize(("side", "size"), [(512, 64), (512, 224), (1024, 96), (700, 64)])
def test_the_quick_reduction_is_within_two_grey_levels_of_the_exact_one(
    side: int, size: int
) -> None:
    image = _textured(side)
    exact = Image.fromarray(image.astype(np.float32)).resize((size, size), Image.BILINEAR)

    assert np.abs(resize(image, size, size) - np.asarray(exact)).max() <= 2.5  # 0.5 of rounding


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_reducing_before_a_window_that_cuts_nothing_off_is_exact(inverted: bool, bits: Any) -> None:
    stored = _textured(512).astype(np.int16) * 16 - 2000
    grey = Grey(12, True, 2.0, 100.0, voi=Voi(100, 10000, "LINEAR_EXACT"), inverted=inverted)
    small = Image.fromarray(stored.astype(np.float32)).resize((224, 224), Image.BILINEAR)
    share = (np.asarray(small) * 2.0 + 100 - (100 - 5000)) / 10000
    expected = (1 - share if inverted else share) * (2**bits - 1)

    pixels, _ = render_grey(stored, grey, Rendering(size=224, bits=bits))

    assert np.abs(pixels - expected).max() <= 0.52


def test_what_a_window_cuts_off_does_not_weigh_in_the_average() -> None:
    stored = np.zeros((64, 64), np.uint16)
    stored[:, ::2] = 10000

    pixels, _ = render_grey(stored, Grey(16, voi=Voi(50, 100)), Rendering(size=16))

    assert np.abs(pixels[2:-2, 2:-2].astype(int) - 128).max() <= 2


@given(values=st.lists(st.integers(-32768, 32767), min_size=2, max_size=40))
def test_the_table_gives_what_the_formula_gives(values: list[int]) -> None:
    grey = Grey(16, True, 1.5, -10.0, voi=Voi(0, 800, "SIGMOID"))

    got = shown(values, grey, np.int16, bits=16) if len(values) >= 4 else []

    exact = 65535 / (1 + np.exp(-4 * (np.array(values) * 1.5 - 10) / 800))
    assert np.abs(np.array(got) - exact[: len(got)]).max(initial=0) <= 0.51


def test_reduction_has_no_moire() -> None:
    stripes = np.zeros((512, 512), np.uint8)
    stripes[:, ::2] = 255

    assert np.ptp(resize(stripes, 60, 60)[5:-5, 5:-5]) <= 4


def test_keeping_the_aspect_centres_the_image_on_black() -> None:
    stored = np.full((32, 64), 255, np.uint8)

    pixels, rendered = render_grey(stored, Grey(8), Rendering(size=16, keep_aspect=True))

    assert (rendered.content_rows, rendered.content_columns) == (8, 16)
    assert (rendered.top, rendered.left) == (4, 0)
    assert (pixels[4:12] == 255).all()
    assert (pixels[:4] == 0).all()


def test_the_aspect_of_a_pixel_counts() -> None:
    stored = np.full((32, 64), 255, np.uint8)

    _, rendered = render_grey(stored, Grey(8), Rendering(size=16, keep_aspect=True), aspect=2.0)

    assert (rendered.content_rows, rendered.content_columns) == (16, 16)


@pytest.mark.parametrize(
    ("colour", "shape"), [("keep", (8, 8, 3)), ("rgb", (8, 8, 3)), ("grey", (8, 8))]
)
def test_channels_are_as_asked(colour: Any, shape: tuple[int, ...]) -> None:
    rgb = np.zeros((16, 16, 3), np.uint8)
    rgb[..., 0] = 255

    pixels, _ = render_colour(rgb, 8, Rendering(size=8, colour=colour))

    assert pixels.shape == shape
    assert pixels.max() == (76 if colour == "grey" else 255)  # 0.299 * 255


@given(frames=st.integers(1, 500), wanted=st.integers(1, 600))
def test_chosen_frames_exist_rise_and_are_as_many_as_asked(frames: int, wanted: int) -> None:
    chosen = Rendering(frames=wanted).chosen_frames(frames)

    assert len(chosen) == min(frames, wanted)
    assert chosen == sorted(set(chosen))
    assert chosen[0] >= 0
    assert chosen[-1] < frames


def test_the_middle_frame_is_in_the_middle() -> None:
    assert Rendering(frames="middle").chosen_frames(9) == [4]


def test_percentiles_that_fall_are_refused() -> None:
    with pytest.raises(ValidationError, match="rise"):
        Rendering(percentiles=(99, 1))
