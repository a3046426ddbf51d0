"""Decode PNG, JPEG, TIFF and BMP files to frames."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import PIL
from PIL import Image, ImageOps

from medspark.images.frame import Attributes, Frame, sha256_of
from medspark.images.limits import Limits
from medspark.images.reasons import Reason, Unreadable
from medspark.images.rendering import Grey, Rendering, Stored, render_colour, render_grey

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_GREY_MODES = ("1", "L", "I;16", "I;16L", "I;16B", "I", "F")
_COLOUR_MODES = ("P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr", "CMYK")


def decode_raster(
    file: BinaryIO, size: int, *, rendering: Rendering, limits: Limits
) -> Iterator[Frame]:
    """Yield the frames (TIFF: pages) of a raster ``file`` of ``size`` bytes. Raises Unreadable."""
    with _opened(file) as image:
        frames = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
        limits.check_frame(image.height, image.width, frames)
        chosen = rendering.chosen_frames(frames)
        channels = 1 if image.mode in _GREY_MODES else 3
        limits.check_output(len(chosen) * rendering.frame_bytes(channels))
        for index in chosen:
            if frames > 1:
                image.seek(index)
            yield _frame(image, index, frames, size, rendering, limits)


def _opened(file: BinaryIO) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns up to twice its limit. medspark's limits are checked before decoding.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(file, formats=_FORMATS)
        except PIL.UnidentifiedImageError:
            raise Unreadable(Reason.DECODE_FAILED, "the image's header is damaged") from None
        except Image.DecompressionBombError:
            raise Unreadable(Reason.TOO_LARGE) from None


def _frame(
    image: Image.Image, index: int, frames: int, size: int, rendering: Rendering, limits: Limits
) -> Frame:
    stored = _stored(image, size, limits)
    bits = 1 if image.mode == "1" else 8 * stored.dtype.itemsize
    photometric = "RGB" if stored.ndim == 3 else "MONOCHROME2"
    if stored.ndim == 3:
        pixels, rendered = render_colour(stored, bits, rendering)
    else:
        pixels, rendered = render_grey(stored, Grey(bits_stored=bits), rendering)
    attributes = Attributes(
        file_format=(image.format or "").lower(),
        rows=stored.shape[0],
        columns=stored.shape[1],
        frames=frames,
        samples_per_pixel=3 if stored.ndim == 3 else 1,
        bits_stored=bits,
        photometric=photometric,
        decoder=f"pillow {PIL.__version__}",
    )
    return Frame(pixels, index + 1, sha256_of(stored, photometric), attributes, rendered)


def _stored(image: Image.Image, size: int, limits: Limits) -> Stored:
    """Return the page's values: (rows, columns), or (rows, columns, 3) if it has colour."""
    limits.check_frame(image.height, image.width)
    if image.mode not in _GREY_MODES + _COLOUR_MODES:
        raise Unreadable(Reason.UNSUPPORTED_PHOTOMETRIC)
    channels = {"F": 4, "I": 4}.get(image.mode, 2 if "16" in image.mode else len(image.getbands()))
    limits.check_expansion(size, image.height * image.width * channels)
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        cut = "truncated" in str(error).lower()
        raise Unreadable(Reason.TRUNCATED if cut else Reason.DECODE_FAILED) from None
    upright = ImageOps.exif_transpose(image) if "exif" in image.info else image
    if image.mode == "1":
        return np.asarray(upright).astype(np.uint8)
    if image.mode in ("I;16", "I;16L", "I;16B"):
        return np.asarray(upright).astype(np.uint16)  # native byte order
    if image.mode in _GREY_MODES:
        return np.asarray(upright)
    return one_channel_if_grey(np.asarray(_opaque(upright)))


def _opaque(image: Image.Image) -> Image.Image:
    """Return ``image`` as RGB on a black background."""
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        with_alpha = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, with_alpha).convert("RGB")
    return image.convert("RGB")


def one_channel_if_grey(rgb: Stored) -> Stored:
    """Return ``rgb`` as (rows, columns) if its three channels are equal, else unchanged."""
    red = rgb[..., 0]
    if np.array_equal(red, rgb[..., 1]) and np.array_equal(red, rgb[..., 2]):
        return np.ascontiguousarray(red)
    return rgb
