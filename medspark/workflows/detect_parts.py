"""The images of a detection: four parts that share none, and the attacks on each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from medspark.defend.detect.pieces import drawn_rows
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.summary import Array
from medspark.seeding import derive, uniform
from medspark.shards.local import local_shards
from medspark.shards.manifest import Manifest
from medspark.shards.schema import read_patients
from medspark.workflows.detect_config import DetectConfig

__all__ = ["Part", "Parts"]

# Training images that detectors refer to, others that they learn attacks from, and the validation
# and test images.
Part = Literal["reference", "contrast", "validation", "test"]


@dataclass(frozen=True)
class Parts:
    """Which images are in each part, and how they are attacked."""

    config: DetectConfig
    manifest: Manifest

    def split(self, part: Part) -> str:
        """Return the split of the shards that a part is drawn from."""
        return {"validation": "val", "test": "test"}.get(part, "train")

    def rows(self, part: Part) -> Array:
        """Return the sorted rows of a part in its split."""
        fit, seed = self.config.fit, self.config.seed
        total = self.manifest.splits[self.split(part)].rows
        if part == "test":
            return self.attacks(part).rows(total)
        if part == "validation":
            return drawn_rows(total, fit.validation_images, seed=seed)
        # With few training images, half of them are left for the contrast.
        referred = min(fit.reference_images, total // 2)
        if part == "reference":
            return drawn_rows(total, referred, seed=seed)
        return drawn_rows(total, fit.contrast_images, seed=seed, after=referred)

    def choosing(self) -> Array:
        """Return which validation images choose the guard, (N,): those of half of the patients."""
        patients = self.of_images(read_patients, "validation")
        _, number = np.unique(patients, return_inverse=True)
        count = int(number.max()) + 1
        places = uniform(derive(self.config.seed, "detect/half"), np.arange(count))
        half: Array = places.argsort().argsort()[number] < count // 2
        return half

    def attacks(self, part: Part) -> AttackSettings:
        """Return the attacks on the images of a part."""
        if part == "reference":
            return self.config.settings_of(())
        if part != "contrast":
            return self.config.settings_of(self.config.attacks)
        learnt, fit = self.learnt(), self.config.fit
        if not fit.left_out:
            return learnt
        attacks = tuple(dict.fromkeys((fit.attack, *self.config.attacks)))
        budgets = tuple(dict.fromkeys((*learnt.eps, *self.config.eps)))
        return self.config.settings_of(attacks, budgets)

    def learnt(self) -> AttackSettings:
        """Return the attack that detectors learn from."""
        return self.config.settings_of((self.config.fit.attack,), self.config.fit.eps)

    def of_images(self, read: Callable[[Path], Array], part: Part) -> Array:
        """Return what ``read`` gives for each image of a part, (N,), in the order of its rows."""
        shards = self.manifest.splits[self.split(part)].shards
        place = local_shards(self.config.shards)
        values = np.concatenate([read(place / shard.path) for shard in shards])
        found: Array = values[self.rows(part)]
        return found
