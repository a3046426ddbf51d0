"""Choose a network's operating point on validation images, clean or attacked."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medspark.attacks.threat import ThreatModel
from medspark.data.native import MappedSplit
from medspark.evaluate.answers import Array, answers_of
from medspark.evaluate.config import AttackSettings, DecisionConfig
from medspark.evaluate.decision import best_cut, probability, rates_at
from medspark.evaluate.robust import attack_all
from medspark.evaluate.summary import each_once
from medspark.models.card import Decision, read_card
from medspark.models.checkpoint import calibrate, load_classifier
from medspark.train.validate import gatherer, slices
from medspark.train.world import World

__all__ = ["decide_on", "scores_of"]


def decide_on(
    folder: Path,
    images: MappedSplit,
    patients: Array,
    config: DecisionConfig,
    *,
    threat: ThreatModel,
    settings: AttackSettings,
    world: World,
) -> None:
    """Choose the threshold of the calibrated model in ``folder``, and write it to the card.

    ``patients`` (N,) holds the patient of each image. Each rank takes a slice of the images. PGD
    has the budget of ``threat`` and the steps of ``settings``.
    """
    assert config.criterion is not None, "the caller has checked that there is a decision"
    card = read_card(folder)
    yes = config.positive_of(card.classes, multi_label=card.multi_label)
    attacked = threat if config.under == "pgd" else None
    scores = scores_of(folder, images, np.arange(len(images)), yes, attacked, settings, world)
    positive = images.labels == yes
    cut = best_cut(scores, positive, criterion=config.criterion, target=config.target)
    found, spared = rates_at(scores, positive, cut, patients)
    decision = Decision(
        positive=card.classes[yes],
        threshold=float(probability(cut / card.temperature)),
        criterion=config.criterion,
        target=config.target,
        under=config.under,
        eps=threat.eps if attacked else 0.0,
        norm=threat.norm,
        sensitivity=found,
        specificity=spared,
    )
    if world.is_main:
        calibrate(folder, card.temperature, decision)
    world.barrier()


def scores_of(
    folder: Path,
    images: MappedSplit,
    rows: Array,
    yes: int,
    threat: ThreatModel | None,
    settings: AttackSettings,
    world: World,
) -> Array:
    """Return the raw log-odds (N,) of class ``yes`` for the sorted ``rows``, under PGD or clean.

    They are those of the network in ``folder``, before temperature and decision.
    """
    attack = settings.model_copy(
        update={
            "attacks": () if threat is None else ("pgd",),
            "norm": settings.norm if threat is None else threat.norm,
            "eps": () if threat is None else (threat.eps,),
            "sanity_images": 0,
        }
    )
    batches = slices(images, rows, batch_size=settings.batch_size, world=world)
    found = attack_all(load_classifier(folder).to(world.device), batches, attack)
    arrays = each_once({name: gatherer(world)(values) for name, values in found.items()})
    (key,) = [trial.key for trial in attack.trials()] or ["clean"]
    return answers_of(arrays["labels"], arrays[key]).log_odds(yes)
