"""The images of a detection: five parts that share none, and the attacks on each."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
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

_LOGGER = logging.getLogger(__name__)

# Training images that detectors refer to, others that they learn attacks from, validation images
# that choose the guard, others that set its threshold, and test images. Reference and calibration
# are not attacked.
Part = Literal["reference", "contrast", "choosing", "calibration", "test"]


@dataclass(frozen=True)
class Parts:
    """Which images are in each part, and how they are attacked."""

    config: DetectConfig
    manifest: Manifest

    def split(self, part: Part) -> str:
        """Return the split of the shards that a part is drawn from."""
        return {"choosing": "val", "calibration": "val", "test": "test"}.get(part, "train")

    def rows(self, part: Part) -> Array:
        """Return the sorted rows of a part in its split."""
        fit, seed = self.config.fit, self.config.seed
        total = self.manifest.splits[self.split(part)].rows
        if part == "test":
            return self.attacks(part).rows(total)
        if part == "choosing":
            return self._drawn(self._halves[0], fit.choosing_images)
        if part == "calibration":
            return self._halves[1]
        # With few training images, half of them are left for the contrast.
        referred = min(fit.reference_images, total // 2)
        if part == "reference":
            return drawn_rows(total, referred, seed=seed)
        return drawn_rows(total, fit.contrast_images, seed=seed, after=referred)

    @cached_property
    def _halves(self) -> tuple[Array, Array]:
        """The validation rows that choose the guard and those that calibrate it, by patient.

        The images of a single patient are halved themselves.
        """
        total = self.manifest.splits["val"].rows
        rows = drawn_rows(total, self.config.fit.validation_images, seed=self.config.seed)
        _, number = np.unique(self._read(read_patients, "val")[rows], return_inverse=True)
        if number.max() == 0:
            _LOGGER.warning(
                "all %d validation images are of one patient: half of the images choose the guard, "
                "and the other half set its threshold; the false-positive rate may not hold for "
                "other patients",
                len(rows),
            )
            number = np.arange(len(rows))
        count = int(number.max()) + 1
        places = uniform(derive(self.config.seed, "detect/half"), np.arange(count))
        half: Array = places.argsort().argsort()[number] < count // 2
        return rows[half], rows[~half]

    def _drawn(self, rows: Array, count: int | None) -> Array:
        """Return ``count`` of ``rows``, or all of them, in their order."""
        places = uniform(derive(self.config.seed, "detect/choosing"), rows).argsort()[:count]
        drawn: Array = rows[np.sort(places)]
        return drawn

    def attacks(self, part: Part) -> AttackSettings:
        """Return the attacks on the images of a part."""
        if part in ("reference", "calibration"):
            return self.config.settings_of(())
        if part != "contrast":
            return self.config.settings_of(self.config.attacks)
        learnt, fit = self.learnt(), self.config.fit
        if not fit.left_out:
            return learnt
        attacks = tuple(dict.fromkeys((*fit.attacks, *self.config.attacks)))
        budgets = tuple(dict.fromkeys((*learnt.eps, *self.config.eps)))
        return self.config.settings_of(attacks, budgets)

    def learnt(self) -> AttackSettings:
        """Return the attacks that detectors learn from."""
        return self.config.settings_of(self.config.fit.attacks, self.config.fit.eps)

    def of_images(self, read: Callable[[Path], Array], part: Part) -> Array:
        """Return what ``read`` gives for each image of a part, (N,), in the order of its rows."""
        found: Array = self._read(read, self.split(part))[self.rows(part)]
        return found

    def _read(self, read: Callable[[Path], Array], split: str) -> Array:
        place = local_shards(self.config.shards)
        shards = self.manifest.splits[split].shards
        return np.concatenate([read(place / shard.path) for shard in shards])
