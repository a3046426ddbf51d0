"""Make a guard of the trained embedding, and attack the network through it.

The detector is the distance to the mean embedding of clean training images. Clean validation images
set its threshold. It is judged on test images, at the budget that it was trained against: under
attacks that do not know the detector, and under attacks on network and detector together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from medspark.data.native import MappedSplit
from medspark.defend.denoise.config import DenoiseFit
from medspark.defend.detect.adaptive import Target
from medspark.defend.detect.checks import area_under_attack, detector_flags
from medspark.defend.detect.contrastive import Contrastive
from medspark.defend.detect.examine import Examination
from medspark.defend.detect.extract import Extractor
from medspark.defend.detect.features import EMBEDDING, Features
from medspark.defend.detect.figures import Scores, false_positives
from medspark.defend.detect.guard import Guard, guard_of, save_guard
from medspark.defend.detect.pieces import drawn_rows
from medspark.evaluate.config import AttackSettings, through_denoiser
from medspark.evaluate.summary import Array, Arrays, each_once
from medspark.files import sha256_of
from medspark.models.card import WEIGHTS
from medspark.models.checkpoint import load_classifier
from medspark.shards.local import local_shards
from medspark.shards.schema import read_patients, read_sites
from medspark.train.run_setup import RunSetup
from medspark.train.validate import gatherer, slices

__all__ = ["judge_detector"]


def judge_detector(config: DenoiseFit, setup: RunSetup) -> dict[str, Any]:
    """Keep the guard beside the network's weights; return its part of the result document.

    Every rank examines a slice of the images and returns the same.
    """
    return _Judge(config, setup).document()


@dataclass(frozen=True)
class _Judge:
    config: DenoiseFit
    setup: RunSetup

    @property
    def attacks(self) -> AttackSettings:
        """The attacks that do not know the detector, at the budget of the training."""
        return self.config.evaluate.model_copy(
            update={
                "attacks": through_denoiser(("fgsm", "pgd")),
                "eps": (self.config.attack.eps,),
                "norm": self.config.attack.norm,
            }
        )

    def document(self) -> dict[str, Any]:
        setup, judge = self.setup, self.config.judge
        model = load_classifier(setup.model_folder).to(setup.world.device).requires_grad_(False)
        detector = self._fitted(model)
        validated = self._examine(model, detector, setup.validation)
        calibration = validated["clean/scores"]
        spread = max(float(calibration.std()), 1e-9)
        target = Target(detector, float(calibration.mean()), spread)
        arrays = self._examine(model, detector, setup.test, target)
        guard = Guard(
            replace(detector, prototype=detector.prototype.cpu()),
            calibration[:, 0],
            judge.fpr,
            judge.action,
        )
        if setup.world.is_main:
            self._keep(guard)
        trials = self.attacks.trials()
        scores = Scores(
            arrays, [detector], [target], trials, judge.adaptive.attacks, calibration, judge.fpr
        )
        area, _ = area_under_attack(validated, trials, 0)
        flags = detector_flags(
            arrays, [detector], [target], trials, calibration=calibration, validated=[area]
        )
        flagged = guard.suspicious(arrays["clean/scores"][:, 0])
        return {
            "detectors": [figures.as_json() for figures in scores.figures()],
            "detector_flags": [flag.model_dump(mode="json") for flag in flags],
            "guard": str(guard_of(setup.model_folder)),
            "action": judge.action,
            "false_positives": self._false_positives(arrays, flagged).as_json(),
        }

    def _rows(self, split: MappedSplit) -> Array:
        return drawn_rows(len(split), self.config.judge.images, seed=self.config.seed)

    def _fitted(self, model: nn.Module) -> Contrastive:
        """Return the detector of clean training images; every rank embeds all of them."""
        train, size = self.setup.source.split("train"), self.config.evaluate.batch_size
        rows, look = self._rows(train), Extractor.on(model, (EMBEDDING,), "")
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        with torch.no_grad():
            found = [
                look(train.tensors(part, self.setup.world.device)[0]).layers[EMBEDDING]
                for part in parts
            ]
        return Contrastive.of(EMBEDDING, torch.cat(found))

    def _examine(
        self, model: nn.Module, detector: Contrastive, split: MappedSplit, *targets: Target
    ) -> Arrays:
        """Return the scores of the drawn images of ``split``, each once, on every rank."""
        attacks, world = self.attacks, self.setup.world
        examination = Examination(
            model=model,
            head="",
            detectors=[detector],
            targets=targets,
            oblivious=attacks,
            adaptive=self.config.judge.adaptive,
            bits=self.setup.source.manifest.bits,
        )
        rows = self._rows(split)
        mine = examination.arrays(
            slices(split, rows, batch_size=attacks.batch_size, world=world)
        )  # fmt: skip
        gather = gatherer(world)
        return each_once({name: gather(values) for name, values in mine.items()})

    def _keep(self, guard: Guard) -> None:
        folder = guard_of(self.setup.model_folder)
        folder.mkdir(exist_ok=True)
        manifest = self.setup.source.manifest
        detector = guard.detector
        assert isinstance(detector, Contrastive)
        any_image = Features(
            torch.zeros(1, len(manifest.classes)), {EMBEDDING: detector.prototype[None]}
        )
        network = sha256_of(self.setup.model_folder / WEIGHTS)
        save_guard(folder, guard, features=any_image, head="", network=network)

    def _false_positives(self, arrays: Arrays, flagged: Array) -> Any:
        source, manifest = local_shards(self.config.shards), self.setup.source.manifest
        shards = manifest.splits["test"].shards
        patients, sites = (
            np.concatenate([read(source / shard.path) for shard in shards])[arrays["rows"]]
            for read in (read_patients, read_sites)
        )
        classes: Sequence[str] = () if manifest.multi_label else manifest.classes
        return false_positives(
            flagged,
            asked=self.config.judge.fpr,
            patients=patients,
            labels=arrays["labels"],
            classes=classes,
            sites=sites,
        )
