"""Example images before and after an attack, with predictions and Grad-CAM maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medspark.attacks.losses import probabilities
from medspark.attacks.pgd import pgd
from medspark.attacks.threat import ThreatModel
from medspark.evaluate.gradcam import grad_cam
from medspark.models.classifier import Classifier, evaluating

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Exhibit:
    """One image (H, W, C) in [0, 1], clean and attacked, with probabilities and Grad-CAM maps."""

    label: Array  # a class (), or findings (K,)
    clean: Array
    attacked: Array
    clean_probabilities: Array
    attacked_probabilities: Array
    clean_map: Array
    attacked_map: Array


def exhibits(
    model: Classifier, images: Tensor, labels: Tensor, *, threat: ThreatModel, steps: int = 20
) -> list[Exhibit]:
    """Return ``images`` (B, C, H, W) together with their versions under PGD."""
    with evaluating(model):
        attacked = pgd(model, images, labels, threat=threat, steps=steps)
        predictions = [_predict(model, pixels, labels) for pixels in (images, attacked)]
    (before, clean_maps), (after, attacked_maps) = predictions
    return [
        Exhibit(
            label=labels[i].numpy(),
            clean=_channels_last(images[i]),
            attacked=_channels_last(attacked[i]),
            clean_probabilities=before[i],
            attacked_probabilities=after[i],
            clean_map=clean_maps[i],
            attacked_map=attacked_maps[i],
        )
        for i in range(len(images))
    ]


def typical_rows(labels: Array, count: int) -> Array:
    """Return ``count`` row numbers that cycle through the labels, in row order for each label."""
    _, kinds = np.unique(labels, axis=0, return_inverse=True)
    order = np.argsort(kinds.reshape(-1), kind="stable")
    turn = np.concatenate([np.arange(count) for count in np.bincount(kinds.reshape(-1))])
    chosen: Array = order[np.argsort(turn, kind="stable")][:count]
    return chosen


def _predict(model: Classifier, images: Tensor, labels: Tensor) -> tuple[Array, Array]:
    """Return the probabilities (B, K) and the Grad-CAM maps (B, H, W)."""
    with torch.no_grad():
        answers = probabilities(model(images), labels)
    maps = grad_cam(model, images, answers.argmax(1))
    return answers.numpy(), maps.numpy()


def _channels_last(image: Tensor) -> Array:
    pixels: Array = image.permute(1, 2, 0).numpy()
    return pixels
