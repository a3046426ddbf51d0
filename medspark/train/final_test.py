"""Calibrate the chosen network after training, choose its operating point, and attack it there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from medspark.data.native import MappedSplit
from medspark.evaluate.calibrate import best_temperature
from medspark.evaluate.noise_result import NoiseResult
from medspark.evaluate.noisy import judge_noise, judged_rows
from medspark.evaluate.result import RobustnessResult
from medspark.evaluate.robust import evaluate
from medspark.evaluate.summary import Detail
from medspark.models.card import read_card
from medspark.models.checkpoint import calibrate, load_classifier
from medspark.models.deciding import deciding
from medspark.train.decide import decide_on
from medspark.train.run_setup import RunSetup
from medspark.train.validate import gatherer, slices
from medspark.train.world import World

__all__ = ["calibrate_and_test", "calibrate_on", "judge_with_noise"]

# A temperature fitted to few images is inaccurate. These need one clean forward pass only.
_CALIBRATION_IMAGES = 1024


def calibrate_and_test(setup: RunSetup) -> RobustnessResult:
    """Calibrate the chosen network, decide, and attack it on the test images.

    Each rank takes a slice. With a decision, the figures are those of its answers, and have
    intervals.
    """
    if setup.world.is_main:
        _calibrate(setup)
    setup.world.barrier()
    config = setup.config.evaluate
    if setup.config.decision.criterion is not None:
        decide_on(
            setup.model_folder,
            setup.validation,
            setup.source.patients("val"),
            setup.config.decision,
            threat=setup.config.attack,
            settings=config,
            world=setup.world,
        )
    card = read_card(setup.model_folder)
    model = deciding(load_classifier(setup.model_folder), card).to(setup.world.device)
    rows = config.rows(len(setup.test))
    decides = card.decision is not None
    return evaluate(
        model,
        slices(setup.test, rows, batch_size=config.batch_size, world=setup.world),
        config,
        gather=gatherer(setup.world),
        positive=card.positive,
        probed_below=config.probed_below(rows),
        detail=Detail(groups=setup.source.patients("test")[rows]) if decides else None,
    )


def judge_with_noise(setup: RunSetup) -> NoiseResult | None:
    """Judge the chosen network with its noisy weights; None if it has none.

    It is attacked at the eps it was trained against, on as many images as the sanity probes take.
    """
    pruning = read_card(setup.model_folder).pruning
    if pruning is None or not pruning.noise:
        return None
    config = setup.config.evaluate
    rows = judged_rows(config, len(setup.test))
    return judge_noise(
        load_classifier(setup.model_folder, noisy=True).to(setup.world.device),
        slices(setup.test, rows, batch_size=config.batch_size, world=setup.world),
        threat=setup.config.attack,
        steps=config.steps,
        seed=config.seed,
        gather=gatherer(setup.world),
    )


def _calibrate(setup: RunSetup) -> None:
    device, size = setup.world.device, setup.config.evaluate.batch_size
    calibrate_on(setup.model_folder, setup.validation, batch_size=size, device=device)


def calibrate_on(
    folder: Path, images: MappedSplit, *, batch_size: int, device: torch.device
) -> None:
    """Fit the temperature of the model in ``folder`` to ``images``, and write it to the card."""
    alone = World(0, 0, 1, device)
    model = load_classifier(folder).to(device)
    rows = np.arange(min(_CALIBRATION_IMAGES, len(images)))
    batches = slices(images, rows, batch_size=batch_size, world=alone)
    with torch.inference_mode():
        answers = [(model(images), labels) for images, labels, _ in batches]
    logits, labels = (torch.cat(parts) for parts in zip(*answers, strict=True))
    calibrate(folder, best_temperature(logits, labels))
