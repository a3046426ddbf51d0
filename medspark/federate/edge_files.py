"""Decode or make images of the tail, in the pixel format of a dataset's shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medspark.data.batch import Pixels
from medspark.errors import UsageError
from medspark.images.decode import decode
from medspark.images.deidentify import Pseudonyms
from medspark.images.frame import Frame
from medspark.images.guard import GuardedDecoder
from medspark.images.phantom import PhantomConfig, encode, plan
from medspark.images.reasons import Unreadable
from medspark.images.rendering import Rendering
from medspark.images.secret import KEY_BYTES
from medspark.shards.manifest import Manifest
from medspark.shards.schema import PixelFormat

__all__ = ["of_folder", "of_phantom"]

_PHANTOM_IMAGES = 240
_PHANTOM_PIXELS = 96  # height and width before rendering, as in the usual archive


def of_folder(folder: Path, manifest: Manifest) -> dict[str, list[Pixels]]:
    """Return the distinct images of ``folder`` by patient; files that are no images are skipped.

    Raises UsageError if an image has other channels, or if fewer than two patients have images.
    """
    found: dict[str, Pixels] = {}
    owners: dict[str, str] = {}
    # The pseudonyms only group a patient's files here, and go nowhere.
    pseudonyms = Pseudonyms(bytes(KEY_BYTES))
    with GuardedDecoder(rendering=_rendering(manifest), pseudonyms=pseudonyms) as decoder:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            for frame in _frames(decoder.decode(path)):
                key = frame.pixel_sha256
                found[key] = _fitting(frame, manifest.pixel_format, path)
                owners[key] = frame.attributes.patient_key or key
    grouped: dict[str, list[Pixels]] = {}
    for key, pixels in sorted(found.items()):
        grouped.setdefault(owners[key], []).append(pixels)
    if len(grouped) < 2:
        raise UsageError(
            f"adversary.edge: {folder} holds images of {len(grouped)} patients; a test on other "
            "patients needs two."
        )
    return grouped


def of_phantom(manifest: Manifest, *, diseased: bool, seed: int) -> dict[str, list[Pixels]]:
    """Return synthetic images in the portable style, all of one class, by patient."""
    phantom = PhantomConfig(
        count=_PHANTOM_IMAGES,
        size=max(_PHANTOM_PIXELS, manifest.height),
        seed=seed,
        prevalence=float(diseased),
        syntaxes=("png",),
        bits=(8,),
        style="portable",
    )
    rendering = _rendering(manifest)
    grouped: dict[str, list[Pixels]] = {}
    for study in plan(phantom):
        for frame in decode(encode(study, phantom), rendering=rendering):
            pixels = _fitting(frame, manifest.pixel_format, "the phantom")
            grouped.setdefault(str(study.patient.number), []).append(pixels)
    return grouped


def _frames(frames: Iterator[Frame]) -> Iterator[Frame]:
    try:
        yield from frames
    except Unreadable:
        return


def _rendering(manifest: Manifest) -> Rendering:
    """Return the rendering that made the shards, of the images' size, depth and channels."""
    made: dict[str, Any] = manifest.source.get("rendering") or {}
    format: dict[str, Any] = {"size": manifest.height, "bits": manifest.bits, "frames": "middle"}
    colour = "rgb" if manifest.channels == 3 else "grey"
    return Rendering.model_validate(made | format | {"colour": colour})


def _fitting(frame: Frame, format: PixelFormat, source: object) -> Pixels:
    pixels: Pixels = frame.pixels[..., None] if frame.pixels.ndim == 2 else frame.pixels
    if pixels.shape != format.shape:
        raise UsageError(
            f"adversary.edge: an image of {source} has shape {pixels.shape} instead of "
            f"{format.shape}."
        )
    return pixels
