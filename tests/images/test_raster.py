"""PNG, JPEG, TIFF and BMP files."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from medspark.images.decode import decode
from medspark.images.frame import Frame
from medspark.images.reasons import Reason, Unreadable
from medspark.images.rendering import Rendering

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)


def saved(image: npt.NDArray[Any] | Image.Image, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, kind, **settings)
    return file.getvalue()


def frames_of(data: bytes, **settings: Any) -> list[Frame]:
    return list(decode(data, rendering=Rendering(size=16, **settings)))


def refused(data: bytes) -> Reason:
    with pytest.raises(Unreadable) as caught:
        frames_of(data)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
@pytest.mark.parametrize("image", [GREY, COLOUR], ids=["grey", "colour"])
def test_eight_bit_images_keep_their_values(kind: str, image: npt.NDArray[np.uint8]) -> None:
    (frame,) = frames_of(saved(image, kind))

    assert np.array_equal(frame.pixels, image)
    assert frame.attributes.file_format == kind.lower()


def test_one_image_has_one_digest_in_every_format() -> None:
    digests = {frames_of(saved(GREY, kind))[0].pixel_sha256 for kind in ("PNG", "TIFF", "BMP")}

    assert len(digests) == 1


def test_grey_stored_as_colour_is_one_channel() -> None:
    (frame,) = frames_of(saved(GREY[..., None].repeat(3, axis=2), "PNG"))

    assert np.array_equal(frame.pixels, GREY)
    assert frame.attributes.samples_per_pixel == 1


def test_a_single_coloured_pixel_keeps_three_channels() -> None:
    image = GREY[..., None].repeat(3, axis=2)
    image[0, 0] = 0, 1, 0

    assert frames_of(saved(image, "PNG"))[0].pixels.shape == (16, 16, 3)


def test_a_grey_jpeg_is_close_to_its_source() -> None:
    (frame,) = frames_of(saved(GREY, "JPEG", quality=95))

    assert np.abs(frame.pixels.astype(int) - GREY).max() <= 8


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_read_whole(kind: str) -> None:
    image = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257

    (frame,) = frames_of(saved(image, kind), bits=16, window="full")

    assert np.array_equal(frame.pixels, image)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK", "F", "I"])
def test_every_mode_of_pillow_is_an_image(mode: str) -> None:
    image = Image.fromarray(COLOUR).convert("L" if mode in "FI" else "RGB").convert(mode)

    (frame,) = frames_of(saved(image, "TIFF" if mode in ("CMYK", "F", "I") else "PNG"))

    assert frame.pixels.shape[:2] == (16, 16)
    assert frame.pixels.dtype == np.uint8


def test_what_is_transparent_is_black() -> None:
    image = np.full((16, 16, 4), 255, np.uint8)
    image[:8, :, 3] = 0

    (frame,) = frames_of(saved(image, "PNG"))

    assert (frame.pixels[:8] == 0).all()
    assert (frame.pixels[8:] == 255).all()


def test_a_photograph_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    (frame,) = frames_of(saved(Image.fromarray(GREY), "JPEG", quality=95, exif=exif))

    assert np.abs(frame.pixels.astype(int) - GREY[::-1, ::-1]).max() <= 8


def test_each_page_of_a_tiff_is_a_frame() -> None:
    pages = [Image.fromarray(np.full((16, 16), 50 * page, np.uint8)) for page in range(3)]
    data = saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])

    assert [int(frame.pixels[0, 0]) for frame in frames_of(data)] == [0, 50, 100]
    assert [frame.number for frame in frames_of(data, frames="middle")] == [2]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP"])
def test_a_cut_file_is_refused(kind: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    data = saved(image, kind)

    assert refused(data[: len(data) // 2]) in (Reason.TRUNCATED, Reason.DECODE_FAILED)


def _png(width: int, height: int, depth: int, body: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_a_png_that_claims_more_pixels_than_allowed_is_refused() -> None:
    assert refused(_png(65535, 65535, 8, b"")) is Reason.TOO_LARGE


def test_a_png_bomb_is_refused_before_it_is_inflated() -> None:
    body = zlib.compress(bytes(6000 * 12001), 9)

    assert refused(_png(6000, 6000, 16, body)) is Reason.DECOMPRESSION_BOMB


def test_a_tiff_bomb_is_refused() -> None:
    data = saved(Image.new("L", (12000, 12000)), "TIFF", compression="tiff_lzw")

    assert refused(data) is Reason.TOO_LARGE


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY_FILE),
        (b"<html><body>Not found</body></html>", Reason.NOT_AN_IMAGE),
        (b"GIF89a" + bytes(100), Reason.NOT_AN_IMAGE),
        (b"\x89PNG\r\n\x1a\n", Reason.DECODE_FAILED),
        (b"%PDF-1.7", Reason.NOT_AN_IMAGE),
    ],
    ids=["empty", "html", "gif", "png-head", "pdf"],
)
def test_what_is_no_image_is_refused_with_its_reason(data: bytes, reason: Reason) -> None:
    assert refused(data) is reason
