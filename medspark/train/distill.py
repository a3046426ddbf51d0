"""Distillation: a student learns from the outputs of a trained teacher.

    kd         compress: hard labels and soft labels (Hinton et al. 2015)
    defensive  Papernot et al. 2016: train at a temperature, deploy at 1. It hides gradients and
               does not make a network robust (Carlini and Wagner 2016); included to show that
    ard        robust: match the robust teacher's clean outputs on attacked images (Goldblum 2020)
    rslad      robust: soft labels in the attack as well (Zi et al. 2021)

ard and rslad transfer the teacher's robustness, so the teacher must be adversarially trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medspark.attacks.losses import cross_entropy
from medspark.train.config import DistillConfig
from medspark.train.learner import Learner, Sample, StepRule, StepStats, learn, pgd_images
from medspark.train.objective import divergence, log_answers

__all__ = ["distillation_rule"]

_TEMPERATURE: dict[str, float] = {"kd": 4.0, "defensive": 50.0, "ard": 30.0, "rslad": 1.0}
_ALPHA: dict[str, float] = {"kd": 0.7, "defensive": 1.0, "ard": 1.0, "rslad": 5 / 6}


def distillation_rule(config: DistillConfig, teacher: nn.Module) -> StepRule:
    """Return the step rule of ``config``; ``teacher`` is in eval mode and stays unchanged."""
    temperature = config.temperature or _TEMPERATURE[config.method]
    alpha = _ALPHA[config.method] if config.alpha is None else config.alpha

    @torch.no_grad()
    def teacher_logits(images: Tensor) -> Tensor:
        logits: Tensor = teacher(images)
        return logits

    def softened(teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
        return divergence(teacher / temperature, student / temperature, labels).mean()

    def kd(learner: Learner, sample: Sample) -> StepStats:
        soft = teacher_logits(sample.images)
        logits = learner.logits(learner.model, sample.images)
        distance = softened(soft, logits, sample.labels) * temperature**2
        loss = (1 - alpha) * learner.objective(logits, sample.labels) + alpha * distance
        return learn(loss, sample, clean=logits)

    def defensive(learner: Learner, sample: Sample) -> StepStats:
        soft = teacher_logits(sample.images)
        logits = learner.logits(learner.model, sample.images)
        target, answers = (log_answers(z / temperature, sample.labels) for z in (soft, logits))
        return learn(-(target.exp() * answers).sum(2).mean(), sample, clean=logits)

    def ard(learner: Learner, sample: Sample) -> StepStats:
        soft = teacher_logits(sample.images)
        attacked = _attack(learner, sample, None)
        adversarial = learner.logits(learner.model, attacked)
        distance = softened(soft, adversarial, sample.labels) * temperature**2
        if alpha == 1:
            return learn(distance, sample, adversarial=adversarial, attacked=attacked)
        clean = learner.logits(learner.model, sample.images)
        loss = alpha * distance + (1 - alpha) * learner.objective(clean, sample.labels)
        return learn(loss, sample, clean=clean, adversarial=adversarial, attacked=attacked)

    def rslad(learner: Learner, sample: Sample) -> StepStats:
        soft = teacher_logits(sample.images)
        attacked = _attack(learner, sample, soft)
        adversarial = learner.logits(learner.model, attacked)
        clean = learner.logits(learner.model, sample.images)
        loss = alpha * softened(soft, adversarial, sample.labels)
        loss = loss + (1 - alpha) * softened(soft, clean, sample.labels)
        return learn(loss, sample, clean=clean, adversarial=adversarial, attacked=attacked)

    return {"kd": kd, "defensive": defensive, "ard": ard, "rslad": rslad}[config.method]


def _attack(learner: Learner, sample: Sample, soft: Tensor | None) -> Tensor:
    """Return PGD images against the cross-entropy, or against the teacher's ``soft`` logits."""

    def away_from_teacher(logits: Tensor, labels: Tensor) -> Tensor:
        assert soft is not None
        return divergence(soft, logits, labels)

    return pgd_images(learner, sample, cross_entropy if soft is None else away_from_teacher)
