"""Serve a guarded model: every answer says how suspicious its image is.

A model is guarded if its folder holds a guard. The guard's own card says what becomes of the label
of a suspicious image.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medspark.defend.detect.features import Features
from medspark.defend.detect.guard import GUARD_FILES, Guard, guard_of, load_guard
from medspark.errors import UsageError
from medspark.files import sha256_of
from medspark.models.card import CARD, WEIGHTS, ModelCard, columns_of, read_card
from medspark.models.checkpoint import load_classifier
from medspark.models.classifier import Classifier
from medspark.models.file_predictor import FilePredictor
from medspark.models.prediction import answer_of
from medspark.models.predictor import Predictor

__all__ = ["GuardedPredictor", "copy_guarded", "guarded_files"]


class GuardedPredictor(Predictor):
    """Predicts probabilities and p-values, and withholds answers if its guard refuses them."""

    def __init__(
        self, model: Classifier, card: ModelCard, guard: Guard, *, head: str, batch_size: int = 64
    ) -> None:
        super().__init__(model.requires_grad_(False), card, batch_size=batch_size)
        self._guard, self._look = guard, guard.extractor(model, head)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Return the predictor of the model in ``folder`` with the guard that it holds.

        Raises UsageError without a guard, or for the guard of another network.
        """
        guard, described = load_guard(guard_of(folder))
        if described.network != sha256_of(folder / WEIGHTS):
            raise UsageError(f"The guard in '{guard_of(folder)}' was fitted on another network.")
        return cls(load_classifier(folder), read_card(folder), guard, head=described.head)

    def __call__(self, images: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
        """Return (N, K + 1): probabilities of ``images`` (N, H, W, C), and the p-value of each.

        The probabilities of an image are NaN if the guard withholds them.
        """
        found = self._rows(images)
        if self._guard.action == "refuse":
            found[found[:, -1] > 0, : len(self.card.classes)] = np.nan
        return found[:, :-1].astype(np.float32)

    @property
    def columns(self) -> list[str]:
        """The names of all values that an answer may have."""
        probabilities = columns_of(self.card.classes, guarded=True)
        return ["label", "probability", *probabilities, "suspicious", "p_value"]

    def answers(self, images: npt.NDArray[np.generic]) -> list[dict[str, Any]]:
        """Return label and probabilities of each image, ``suspicious`` and its ``p_value``.

        A suspicious image that the guard refuses gets no label and no probability.
        """
        return [self._answer(row) for row in self._rows(images)]

    def _answer(self, row: npt.NDArray[np.float64]) -> dict[str, Any]:
        *probabilities, p_value, suspicious = row
        doubt = {"suspicious": bool(suspicious), "p_value": float(p_value)}
        if suspicious and self._guard.action == "refuse":
            return doubt
        return answer_of(np.array(probabilities, "f4"), self.card, guarded=True) | doubt

    def _rows(self, images: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
        """Return (N, K + 2): probabilities, the p-value, and 1 if the image is suspicious."""
        parts = self._batches(images, self._judged)
        return np.concatenate([np.empty((0, len(self.card.classes) + 2)), *parts])

    def _judged(self, pixels: Tensor) -> npt.NDArray[np.float64]:
        with torch.no_grad():
            features: Features = self._look(pixels)
            scores = self._guard.detector.score(features).double().numpy()
        doubts = self._guard.p_values(scores), self._guard.suspicious(scores)
        return np.column_stack([self._calibrated(features.logits), *doubts])


def guarded_files(folder: Path) -> FilePredictor:
    """Return what answers image files by the guarded model in ``folder``.

    Raises UsageError as ``GuardedPredictor.load`` does, and for an unknown or invalid limit.
    """
    return FilePredictor.of(GuardedPredictor.load(folder))


def copy_guarded(model: Path, guard: Path, folder: Path) -> None:
    """Copy a model and a guard to ``folder``, as a model that holds its guard."""
    place = guard_of(folder)
    place.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, CARD):
        shutil.copyfile(model / name, folder / name)
    for name in GUARD_FILES:
        shutil.copyfile(guard / name, place / name)
