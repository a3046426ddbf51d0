"""From a decoded file to an answer, by a model's card; NumPy alone, as on a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from medspark.images.rendering import Rendering
from medspark.models.card import ModelCard, columns_of

__all__ = [
    "Floats", "answer_of", "as_pixels", "calibrated", "decided", "probabilities_of",
    "rendering_of", "unit_floats",
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


def decided(probabilities: Floats, card: ModelCard) -> list[str]:
    """Return the label of each row of calibrated ``probabilities`` (N, K).

    It is the decision's class from its threshold on, and the other class below; without a decision
    the likeliest class. For findings, it joins all with a probability above 0.5: ``a|b``.
    """
    if card.multi_label:
        return ["|".join(np.array(card.classes)[row > 0.5]) for row in probabilities]
    yes = card.positive
    if card.decision is None or yes is None:
        return [card.classes[k] for k in probabilities.argmax(axis=1)]
    # Both probabilities, since one may be rounded to 1 where the other still tells images apart.
    likely, threshold = probabilities.astype(np.float64), card.decision.threshold
    called = likely[:, yes] * (1 - threshold) >= likely[:, 1 - yes] * threshold
    return [card.classes[yes if each else 1 - yes] for each in called]


def answer_of(row: Floats, card: ModelCard, *, guarded: bool = False) -> dict[str, Any]:
    """Return label, its probability and the probability of every class, from a row (K,).

    For findings, the probability is the largest one. ``guarded`` states that the answer gets the
    columns of a guard as well.
    """
    (label,) = decided(row[None], card)
    sure = row.max() if card.multi_label else row[card.classes.index(label)]
    named = zip(columns_of(card.classes, guarded=guarded), row, strict=True)
    return {"label": label, "probability": float(sure)} | {
        name: float(value) for name, value in named
    }
