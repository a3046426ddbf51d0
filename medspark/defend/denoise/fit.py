"""What every rank of a denoiser's training runs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from medspark.data.source import Source
from medspark.defend.denoise.config import DenoiseFit
from medspark.defend.denoise.judge import judge_detector
from medspark.defend.denoise.rule import denoising_rule
from medspark.errors import UsageError
from medspark.models.card import PLAIN, read_card
from medspark.models.checkpoint import load_classifier
from medspark.models.classifier import Classifier
from medspark.models.guarded import guard_classifier
from medspark.seeding import derive
from medspark.train.config import FitConfig
from medspark.train.learner import StepRule
from medspark.train.loop import trained
from medspark.train.meter import Recorder
from medspark.train.prepare import Recipe
from medspark.train.prune.pruner import Pruner
from medspark.train.world import World

__all__ = ["fit"]


def fit(config: DenoiseFit, world: World, journal: Recorder) -> dict[str, Any]:
    """Train a denoiser and a detector for a classifier; return the result document.

    The guarded network is saved to ``run_dir/model``, and its guard to ``run_dir/model/guard``.
    Raises UsageError for unusable input, and RunError if training diverges or a later attempt takes
    the run over.
    """
    recipe = Recipe(
        network=partial(_guarded, config),
        step_rule=partial(_rule, config),
        # The classifier does not learn, so its zeros stay; the denoiser has none to keep.
        pruner=_no_pruner,
        chooses=False,
    )
    document, setup = trained(config, world, journal, recipe)
    return document | judge_detector(config, setup)


def _guarded(config: DenoiseFit, fit: FitConfig, source: Source, _: World) -> Classifier:
    manifest = source.manifest
    card = read_card(config.classifier, kinds=PLAIN)
    if difference := card.misfit(manifest):
        raise UsageError(f"The model in {config.classifier} does not fit: {difference}.")
    classifier = load_classifier(config.classifier)
    torch.manual_seed(derive(fit.seed, "weights"))
    size = manifest.height, manifest.width
    guarded = guard_classifier(classifier, config.denoise.shape, size=size)
    guarded.freeze_classifier()
    return guarded


def _rule(config: DenoiseFit, fit: FitConfig, _: Source, __: World) -> StepRule:
    return denoising_rule(config.denoise, eps=fit.attack.eps)


def _no_pruner(_: FitConfig) -> Pruner:
    return Pruner(None, pruned=False)
