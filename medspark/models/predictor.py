"""Predict class probabilities for NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medspark.errors import UsageError
from medspark.models.card import ModelCard, columns_of, read_card
from medspark.models.checkpoint import load_classifier
from medspark.models.classifier import Classifier
from medspark.models.prediction import answer_of, unit_floats


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
        parts = self._batches(images, self._probabilities)
        return np.concatenate(parts) if parts else np.empty((0, len(self.card.classes)), "f4")

    @property
    def columns(self) -> list[str]:
        """The names of all values that an answer may have."""
        return ["label", "probability", *columns_of(self.card.classes)]

    def answers(self, images: npt.NDArray[np.generic]) -> list[dict[str, Any]]:
        """Return for each of ``images`` (N, H, W, C) its label and all probabilities."""
        return [answer_of(row, self.card) for row in self(images)]

    def _batches(
        self, images: npt.NDArray[np.generic], work: Callable[[Tensor], npt.NDArray[Any]]
    ) -> list[npt.NDArray[Any]]:
        """Return what ``work`` makes of each batch of ``images``, given as (B, C, H, W)."""
        pixels = self._to_unit_floats(images)
        starts = range(0, len(pixels), self._batch_size)
        parts = (pixels[start : start + self._batch_size].transpose(0, 3, 1, 2) for start in starts)
        return [work(torch.from_numpy(np.ascontiguousarray(part))) for part in parts]

    def _probabilities(self, pixels: Tensor) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            return self._calibrated(self.model(pixels))

    def _calibrated(self, logits: Tensor) -> npt.NDArray[np.float32]:
        """Return the probabilities (B, K) of ``logits`` at the card's temperature."""
        logits = logits / self.card.temperature
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
