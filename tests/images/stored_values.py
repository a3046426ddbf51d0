"""The stored values of a DICOM file, for comparison with a reference decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from medspark.images.limits import Limits
from medspark.images.part10 import parse
from medspark.images.pixeldata import frames_of, image_pixel
from medspark.images.rendering import Stored


def stored_frames(file: BinaryIO, size: int, *, limits: Limits) -> Iterator[Stored]:
    """Yield every frame's stored values, before any rendering.

    YBR frames come as RGB and the values of PALETTE COLOR as indices. Raises Unreadable.
    """
    parsed = parse(file, size, limits)
    shape = image_pixel(parsed)
    limits.check_frame(shape.rows, shape.columns, shape.frames)
    for _, stored, _, _ in frames_of(parsed, shape, list(range(shape.frames)), limits):
        yield stored
