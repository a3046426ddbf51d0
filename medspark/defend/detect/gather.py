"""The features of training and validation images: clean, noisy and under attack."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from medspark.attacks.keyed_random import KeyedRandom
from medspark.attacks.losses import correct
from medspark.defend.detect.extract import Extractor
from medspark.defend.detect.features import LOGITS, Features
from medspark.defend.detect.stored import as_stored, noise_like
from medspark.errors import UsageError
from medspark.evaluate.attacked import Attacker, ImageBatch
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.robust import Batch
from medspark.evaluate.summary import Array, Arrays

__all__ = ["features_of", "gather", "right", "rows_of"]


def gather(
    extractor: Extractor,
    batches: Iterable[Batch],
    attacks: AttackSettings,
    *,
    bits: int,
    surrogates: Iterable[nn.Module] = (),
) -> Arrays:
    """Return arrays with one row per image: features by condition and layer, rows and labels.

    The conditions are ``clean``, and with attacks ``noisy`` (with the L2 norm of the first attack)
    and each trial's key. The layer ``logits`` is among them.
    """
    found: dict[str, list[Array]] = defaultdict(list)

    def add(condition: str, images: Tensor) -> None:
        features = extractor(images)
        for name, values in {**features.layers, LOGITS: features.logits}.items():
            found[f"{condition}/{name}"].append(values.cpu().numpy())

    attacker: Attacker | None = None
    for pixels, labels, rows in batches:
        batch = ImageBatch(pixels, labels, rows)
        found["rows"].append(rows.numpy())
        found["labels"].append(labels.cpu().numpy())
        add("clean", pixels)
        if not attacks.attacks:
            continue
        attacker = attacker or Attacker.on(
            extractor.tap.model, pixels, attacks, surrogates=tuple(surrogates)
        )
        for number, attacked in enumerate(attacker.attack(batch, *attacker.answer(batch))):
            images = as_stored(attacked.images, pixels, threat=attacked.threat, bits=bits)
            if number == 0:
                rng = KeyedRandom(attacks.seed, rows)
                add("noisy", noise_like(images, pixels, rng, bits=bits))
            add(attacked.trial.key, images)
    if not found:
        raise UsageError("There are no images to gather features from.")
    return {name: np.concatenate(parts) for name, parts in found.items()}


def features_of(arrays: Arrays, condition: str) -> Features:
    """Return the features of all images of ``arrays`` under one condition."""
    prefix = f"{condition}/"
    layers = {
        name.removeprefix(prefix): torch.from_numpy(values)
        for name, values in arrays.items()
        if name.startswith(prefix)
    }
    return Features(layers[LOGITS], layers)


def right(arrays: Arrays, condition: str) -> Tensor:
    """Return whether the network is right on each image, (N,)."""
    logits = torch.from_numpy(arrays[f"{condition}/{LOGITS}"])
    return correct(logits, torch.from_numpy(arrays["labels"]))


def rows_of(arrays: Arrays, chosen: Array) -> Arrays:
    """Return the arrays of some images; ``chosen`` is a mask (N,), or holds positions."""
    return {name: values[chosen] for name, values in arrays.items()}
