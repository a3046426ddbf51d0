"""From a decoded file to an answer, by a model's card; NumPy alone, as on a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from medspark.images.rendering import Rendering
from medspark.models.card import ModelCard, columns_of

__all__ = [
    "Floats", "answer_of", "as_pixels", "calibrated", "probabilities_of", "rendering_of",
    "unit_floats",
]  # fmt: skip

Floats = npt.NDArray[np.float32]


def rendering_of(card: ModelCard) -> Rendering:
    """Return how a file is rendered for the model; of several frames, the middle one is used."""
    colour = "grey" if card.channels == 1 else "rgb"
    settings = card.rendering | {
        "size": card.height, "bits": card.bits, "colour": colour, "frames": "middle",
    }  # fmt: skip
    return Rendering.model_validate(settings)


def as_pixels(rendered: object) -> npt.NDArray[np.generic]:
    """Return rendered pixels (H, W) or (H, W, C) as (H, W, C)."""
    pixels = np.asarray(rendered)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def unit_floats(pixels: npt.NDArray[np.generic], card: ModelCard) -> Floats:
    """Return stored pixels, unsigned integers of the card's bits, as floats in [0, 1]."""
    return pixels.astype(np.float32) / np.float32(2**card.bits - 1)


def calibrated(logits: npt.NDArray[Any], card: ModelCard) -> Floats:
    """Return the probabilities (N, K) of ``logits`` at the card's temperature."""
    return probabilities_of(logits / card.temperature, multi_label=card.multi_label)


def probabilities_of(logits: npt.NDArray[Any], *, multi_label: bool) -> Floats:
    """Return probabilities (N, K): softmax for classes, sigmoid for findings."""
    values = logits.astype(np.float64)
    if multi_label:
        # The sigmoid through an exponential of a negative number, which cannot overflow.
        small = np.exp(-np.abs(values))
        odds: Floats = (np.where(values >= 0, 1.0, small) / (1 + small)).astype(np.float32)
        return odds
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    shares: Floats = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    return shares


def answer_of(row: Floats, card: ModelCard, *, guarded: bool = False) -> dict[str, Any]:
    """Return label, its probability and the probability of every class, from a row (K,).

    For findings, the label joins all with a probability above 0.5: ``a|b``. ``guarded`` states that
    the answer gets the columns of a guard as well.
    """
    label = card.classes[int(row.argmax())]
    if card.multi_label:
        label = "|".join(name for name, p in zip(card.classes, row, strict=True) if p > 0.5)
    named = zip(columns_of(card.classes, guarded=guarded), row, strict=True)
    return {"label": label, "probability": float(row.max())} | {
        name: float(value) for name, value in named
    }
