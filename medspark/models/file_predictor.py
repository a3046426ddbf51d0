"""Image files in, calibrated probabilities out: how a served model is asked by a hospital."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medspark.errors import UsageError
from medspark.images.decode import decode
from medspark.images.reasons import Unreadable
from medspark.images.rendering import Rendering
from medspark.models.card import columns_of
from medspark.models.predictor import Predictor

__all__ = ["FilePredictor"]


class FilePredictor:
    """Answers files, DICOM, PNG, JPEG or TIFF in base64, decoded as the training images were."""

    def __init__(self, predictor: Predictor) -> None:
        card = predictor.card
        self._predictor = predictor
        colour = "grey" if card.channels == 1 else "rgb"
        settings = card.rendering | {
            "size": card.height, "bits": card.bits, "colour": colour, "frames": "middle",
        }  # fmt: skip
        self._rendering = Rendering.model_validate(settings)

    @classmethod
    def load(cls, folder: Path) -> FilePredictor:
        """Return the predictor of the model in ``folder``."""
        return cls(Predictor.load(folder))

    def __call__(self, files: Sequence[str]) -> list[dict[str, Any]]:
        """Return for each of ``files`` the likeliest class and the probability of every class.

        Of findings the label names all that are likelier than not, as ``a|b``.
        Raises UsageError for what is not base64 or not an image that can be read; of several
        frames the middle one is taken.
        """
        images = np.stack([self._pixels(number, text) for number, text in enumerate(files)])
        columns = columns_of(self._predictor.card.classes)
        return [
            {"label": self._label(row), "probability": float(row.max())}
            | {name: float(value) for name, value in zip(columns, row, strict=True)}
            for row in self._predictor(images)
        ]

    def _label(self, row: npt.NDArray[np.float32]) -> str:
        card = self._predictor.card
        if not card.multi_label:
            return card.classes[int(row.argmax())]
        return "|".join(name for name, p in zip(card.classes, row, strict=True) if p > 0.5)

    def _pixels(self, number: int, text: str) -> npt.NDArray[np.generic]:
        try:
            content = base64.b64decode(text, validate=True)
            frame = next(iter(decode(content, rendering=self._rendering)))
        except (binascii.Error, ValueError):
            raise UsageError(f"image {number} is not base64.") from None
        except Unreadable as error:
            raise UsageError(f"image {number} cannot be read: {error}") from None
        pixels = np.asarray(frame.pixels)
        return pixels[..., None] if pixels.ndim == 2 else pixels
