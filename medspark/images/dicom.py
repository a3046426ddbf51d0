"""Decode DICOM files to frames: check the header, decode frame by frame, render as in PS3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from medspark.images.deidentify import Privacy, Pseudonyms, check_burned_in, kept_attributes
from medspark.images.frame import Attributes, Frame, sha256_of
from medspark.images.limits import Limits
from medspark.images.meaning import grey_of, pixel_aspect, to_rgb
from medspark.images.part10 import NotPlain, looks_plain, parse, parse_plain
from medspark.images.pixeldata import GREYS, frames_of, image_pixel
from medspark.images.rendering import Rendering, render_colour, render_grey

__all__ = ["NotPlain", "decode_dicom", "looks_plain"]


def decode_dicom(
    file: BinaryIO,
    size: int,
    *,
    rendering: Rendering,
    limits: Limits,
    privacy: Privacy,
    pseudonyms: Pseudonyms | None,
    plain_only: bool = False,
) -> Iterator[Frame]:
    """Yield the frames of the DICOM ``file`` of ``size`` bytes that ``rendering`` selects.

    Only one frame is in memory at a time. Raises Unreadable, and with ``plain_only`` NotPlain.
    """
    parsed = parse_plain(file, size) if plain_only else parse(file, size, limits)
    shape = image_pixel(parsed)
    limits.check_frame(shape.rows, shape.columns, shape.frames)
    chosen = rendering.chosen_frames(shape.frames)
    limits.check_output(len(chosen) * rendering.frame_bytes(shape.channels))
    if plain_only and shape.frames > 1:
        raise NotPlain
    check_burned_in(parsed.header, privacy)
    kept = kept_attributes(parsed.header, pseudonyms)
    aspect = pixel_aspect(parsed.header)
    for index, stored, photometric, decoder in frames_of(parsed, shape, chosen, limits):
        if photometric in GREYS:
            grey = grey_of(parsed.header, shape, index)
            pixels, rendered = render_grey(stored, grey, rendering, aspect=aspect)
        else:
            colour, bits = to_rgb(stored, parsed.header, shape, photometric)
            pixels, rendered = render_colour(colour, bits, rendering, aspect=aspect)
        attributes = Attributes(
            file_format="dicom",
            rows=shape.rows,
            columns=shape.columns,
            frames=shape.frames,
            samples_per_pixel=shape.samples,
            bits_stored=shape.bits_stored,
            signed=shape.signed,
            photometric=shape.photometric,
            transfer_syntax=str(parsed.syntax),
            decoder=decoder,
            **kept,
        )
        digest = sha256_of(stored, photometric)
        yield Frame(pixels, index + 1, digest, attributes, rendered)
