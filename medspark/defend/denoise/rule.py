"""The training step of a denoiser: attack the classifier, clean the images, compare.

Every image of the batch is seen clean and changed. The classifier stays as it is. Attacks are made
on the classifier alone (oblivious), and with ``through`` on the whole network as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medspark.attacks.fgsm import fgsm
from medspark.attacks.pgd import pgd
from medspark.defend.denoise.config import DenoiseConfig, TrainingAttack
from medspark.defend.denoise.losses import guidance, reconstruction, supervised_contrast
from medspark.models.guarded import GuardedClassifier, Passed
from medspark.train.learner import Learner, Sample, StepRule, StepStats, learn

__all__ = ["denoising_rule", "turn_of"]


def denoising_rule(config: DenoiseConfig, *, eps: float) -> StepRule:
    """Return the step rule of ``config``; ``eps`` is the largest budget of the training attacks."""

    def denoise(learner: Learner, sample: Sample) -> StepStats:
        network: Any = learner.bare
        changed = _changed(network, learner, sample, *turn_of(config, sample.key))
        images = torch.cat([sample.images, changed])
        with learner.precise(images):
            seen: Passed = learner.model(images, "whole")
            with torch.no_grad():
                wanted = network.features(sample.images)
                if config.guide == "logits":
                    wanted = network.backbone.forward_head(wanted)
        looked = seen.features if config.guide == "features" else seen.logits
        attacked = torch.arange(len(images), device=images.device) >= len(changed)
        targets = sample.images.repeat(2, 1, 1, 1), torch.cat([wanted, wanted]).float()
        pixels = reconstruction(seen.denoised, targets[0], eps=eps)
        alike = guidance(looked.float(), targets[1])
        apart = supervised_contrast(seen.embedding, attacked, temperature=config.temperature)
        loss = config.reconstruct * pixels + config.consistency * alike + config.contrast * apart
        clean, adversarial = seen.logits.float().chunk(2)
        return learn(loss, sample, clean=clean, adversarial=adversarial, attacked=changed)

    return denoise


def turn_of(config: DenoiseConfig, key: int) -> tuple[TrainingAttack, bool]:
    """Return how the images of the step with ``key`` are changed, and whether it is through.

    The key is as good as random, and the same on all ranks.
    """
    name = config.attacks[key % len(config.attacks)]
    return name, config.through and (key // len(config.attacks)) % 2 == 1


def _changed(
    network: GuardedClassifier,
    learner: Learner,
    sample: Sample,
    name: TrainingAttack,
    through: bool,
) -> Tensor:
    """Return the changed images (B, C, H, W), inside the threat model of the step."""
    start = sample.random_start()
    if name == "noise":
        return sample.threat.project(
            sample.images + sample.threat.eps * (start - sample.images).sign(), sample.images
        )
    victim: Any = network if through else network.classify
    with learner.fixed():
        if name == "fgsm":
            return fgsm(victim, sample.images, sample.labels, threat=sample.threat)
        return pgd(
            victim,
            sample.images,
            sample.labels,
            threat=sample.threat,
            steps=learner.config.inner_steps,
            start=start,
        )
