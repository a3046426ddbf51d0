"""Predict class probabilities for NumPy arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from medspark.errors import UsageError
from medspark.models.card import ModelCard, read_card
from medspark.models.checkpoint import load_classifier
from medspark.models.classifier import Classifier
from medspark.models.prediction import unit_floats


class Predictor:
    """Predicts probabilities of stored images, calibrated with the card's temperature.

    The probabilities of classes add up to 1; those of findings are independent.
    """

    def __init__(self, model: Classifier, card: ModelCard, *, batch_size: int = 64) -> None:
        self.model = model.eval()
        self.card = card
        self._batch_size = batch_size

    @classmethod
    def load(cls, folder: Path) -> Predictor:
        """Return the predictor of the model in ``folder``."""
        return cls(load_classifier(folder), read_card(folder))

    def __call__(self, images: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
        """Return probabilities (N, K) of ``images`` (N, H, W, C).

        Unsigned integers are stored pixels with the card's ``bits``; floats are in [0, 1]. Raises
        UsageError for any other shape, type or range.
        """
        pixels = self._to_unit_floats(images)
        parts = [
            self._probabilities(pixels[start : start + self._batch_size])
            for start in range(0, len(pixels), self._batch_size)
        ]
        return np.concatenate(parts) if parts else np.empty((0, len(self.card.classes)), "f4")

    def _probabilities(self, pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        with torch.inference_mode():
            logits = self.model(tensor) / self.card.temperature
            values = logits.sigmoid() if self.card.multi_label else logits.softmax(dim=1)
            probabilities: npt.NDArray[np.float32] = values.numpy()
        return probabilities

    def _to_unit_floats(self, images: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
        if images.ndim != 4 or images.shape[3] != self.card.channels:
            raise UsageError(
                f"images should be (N, H, W, {self.card.channels}), not {images.shape}."
            )
        if images.dtype.kind == "u":
            return unit_floats(images, self.card)
        if images.dtype.kind != "f":
            raise UsageError(f"images should be unsigned integers or floats, not {images.dtype}.")
        pixels = images.astype(np.float32)
        if pixels.size and not (pixels.min() >= 0 and pixels.max() <= 1):
            raise UsageError("float images should lie in [0, 1].")
        return pixels
