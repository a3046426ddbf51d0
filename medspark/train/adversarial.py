"""The training modes: each defines one step, the images it attacks and the loss it minimises.

Images are floats in [0, 1], (B, C, H, W). They are augmented first and attacked afterwards. A mode
leaves the step's gradient in ``.grad``; under DDP it costs exactly one all-reduce per bucket. F and
B below are one forward and one backward pass:

    standard      1F 1B     cross-entropy of the clean images
    naive         3F 3B     attack, then clean and attacked images (Goodfellow et al. 2015)
    fused         2F 2B     the same gradient; the backward pass of the clean loss is the attack
    fused_noise   2F 2B     fused, with noise on the clean images (against overfitting to FGSM)
    nfgsm         2F 2B     attacked images only, from a noisy start (de Jorge et al. 2022)
    rs_fgsm       2F 2B     attacked images only, random start in the eps ball (Wong et al. 2020)
    free          1F 1B     per replay; one backward for weights and attack (Shafahi et al. 2019)
    pgd       (K+1)F (K+1)B attacked images only, K steps (Madry et al. 2018)
    trades    (K+2)F (K+1)B clean loss and divergence under attack (Zhang et al. 2019)
    ikl       (K+2)F (K+1)B trades with a loss that pulls clean answers too (Cui et al. 2024)

Using one backward pass for both the attack and the weights is known (Free AT; Fast AdvProp, Mei et
al. 2022). The result is exact with frozen batch norm, or with batch statistics in all passes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medspark.attacks.fgsm import one_step
from medspark.attacks.losses import cross_entropy
from medspark.attacks.threat import ThreatModel
from medspark.models.kernels.casts import cast_weights_once
from medspark.train.config import ModeName
from medspark.train.dual_norm import for_attacked, idle_sum
from medspark.train.learner import Learner, Sample, StepRule, StepStats, learn, pgd_images
from medspark.train.objective import divergence, pair_distance

__all__ = ["MODES", "take_step"]


def standard(learner: Learner, sample: Sample) -> StepStats:
    """Learn from the clean images."""
    loss, logits = _learn(learner, sample, sample.images, 1.0)
    return StepStats(loss, logits, None)


def naive(learner: Learner, sample: Sample) -> StepStats:
    """Attack the images, then learn from the clean and the attacked ones."""
    gradient = learner.gradient(sample.images, sample.labels)
    with learner.quiet():
        clean, logits = _learn(learner, sample, sample.images, learner.config.clean_share)
    return _learn_attacked(learner, sample, sample.images, gradient, clean, logits)


def fused(learner: Learner, sample: Sample) -> StepStats:
    """Attack with the clean loss's own backward pass: ``naive``'s gradient for a third less."""
    return _fused_from(learner, sample, sample.images)


def fused_noise(learner: Learner, sample: Sample) -> StepStats:
    """Do as ``fused``, from noisy images: the noise keeps FGSM training from collapsing."""
    start = learner.noisy(sample, learner.config.noise * sample.threat.eps)
    return _fused_from(learner, sample, start)


def nfgsm(learner: Learner, sample: Sample) -> StepStats:
    """Learn from FGSM images only, from a noisy start, without projection on the eps ball."""
    start = learner.noisy(sample, learner.config.noise * sample.threat.eps)
    gradient = learner.gradient(start, sample.labels)
    attacked = _ascend(start, gradient, sample.threat, learner.step_length(1.0, sample.threat))
    return _learn_from(learner, sample, attacked)


def rs_fgsm(learner: Learner, sample: Sample) -> StepStats:
    """Learn from FGSM images only, from a random start in the eps ball, projected on the ball."""
    start = sample.random_start()
    gradient = learner.gradient(start, sample.labels)
    length = learner.step_length(1.25, sample.threat)
    attacked = one_step(sample.images, gradient, threat=sample.threat, step=length, start=start)
    return _learn_from(learner, sample, attacked)


def free(learner: Learner, sample: Sample) -> StepStats:
    """Learn from one replay of a batch; the next replay starts at ``attacked`` of the result."""
    start = sample.random_start() if sample.start is None else sample.start
    x = start.detach().requires_grad_(True)
    loss, logits = _learn(learner, sample, x, 1.0)
    assert x.grad is not None
    length = learner.step_length(1.0, sample.threat)
    following = one_step(sample.images, x.grad, threat=sample.threat, step=length, start=x)
    return StepStats(loss, None, logits, following)


def madry(learner: Learner, sample: Sample) -> StepStats:
    """Learn from PGD images only."""
    return _learn_from(learner, sample, pgd_images(learner, sample, cross_entropy))


def trades(learner: Learner, sample: Sample) -> StepStats:
    """Learn the clean loss plus ``beta`` times the divergence between clean and PGD images."""
    attacked = _farthest(learner, sample)
    clean, adversarial = _both(learner, sample, attacked)
    distance = divergence(clean, adversarial, sample.labels).mean()
    loss = learner.objective(clean, sample.labels) + learner.config.beta * distance
    return learn(loss, sample, clean=clean, adversarial=adversarial, attacked=attacked)


def ikl(learner: Learner, sample: Sample) -> StepStats:
    """Learn the clean loss plus the improved divergence between clean and PGD images.

    With clean and attacked logits z and z', and the mean answers w to the image's class, that is
    alpha * -sum(softmax(z) log softmax(z')), whose first factor gets no gradient, plus
    beta / 4 * sum_jk w_j w_k ((z_j - z_k) - (z'_j - z'_k))^2, in which clean answers move as well.
    PGD raises the first term.
    """
    attacked = _farthest(learner, sample)
    clean, adversarial = _both(learner, sample, attacked)
    given = learner.answers.config
    soft = -(clean.detach().softmax(1) * adversarial.log_softmax(1)).sum(1)
    pairs = pair_distance(clean, adversarial, learner.answers.of(clean, sample.labels))
    improved = (given.alpha * soft + given.beta / 4 * pairs).mean()
    loss = learner.objective(clean, sample.labels) + improved
    return learn(loss, sample, clean=clean, adversarial=adversarial, attacked=attacked)


MODES: dict[ModeName, StepRule] = {
    "standard": standard,
    "naive": naive,
    "fused": fused,
    "fused_noise": fused_noise,
    "nfgsm": nfgsm,
    "rs_fgsm": rs_fgsm,
    "free": free,
    "pgd": madry,
    "trades": trades,
    "ikl": ikl,
}


def take_step(learner: Learner, sample: Sample) -> StepStats:
    """Leave the gradient of the configured mode and penalty on ``sample`` in ``.grad``."""
    lower = learner.autocast is not None
    with cast_weights_once(sample.images.device.type, autocast=lower):
        if learner.config.gradalign > 0:
            with learner.quiet():
                _align(learner, sample)
        rule = learner.step_rule or MODES[learner.config.mode]
        return rule(learner, sample)


def _farthest(learner: Learner, sample: Sample) -> Tensor:
    """Return images of which PGD moves the answers away from those of the clean images."""
    with torch.no_grad():
        fixed = learner.logits(learner.bare, sample.images)

    def divergence_from_clean(logits: Tensor, labels: Tensor) -> Tensor:
        return divergence(fixed, logits, labels)

    return pgd_images(learner, sample, divergence_from_clean)


def _both(learner: Learner, sample: Sample, attacked: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits (B, K) of the clean and of the ``attacked`` images."""
    clean = learner.logits(learner.model, sample.images)
    with for_attacked(learner.bare):
        return clean, learner.logits(learner.model, attacked)


def _fused_from(learner: Learner, sample: Sample, start: Tensor) -> StepStats:
    x = start.detach().requires_grad_(True)
    # quiet() spans the forward pass too: DDP decides there whether the backward will all-reduce.
    with learner.quiet():
        clean, logits = _learn(learner, sample, x, learner.config.clean_share)
    assert x.grad is not None
    return _learn_attacked(learner, sample, x.detach(), x.grad, clean, logits)


def _learn(
    learner: Learner, sample: Sample, images: Tensor, share: float, *, attacked: bool = False
) -> tuple[Tensor, Tensor]:
    if attacked and learner.config.dual_bn:
        with for_attacked(learner.bare):
            loss, logits = learner.loss(images, sample.labels)
        loss = loss + 0 * idle_sum(learner.bare)
    else:
        loss, logits = learner.loss(images, sample.labels)
    factor = share * sample.weight
    loss = loss if factor == 1 else loss * factor
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), logits


def _learn_attacked(
    learner: Learner, sample: Sample, start: Tensor, gradient: Tensor, clean: Tensor, logits: Tensor
) -> StepStats:
    attacked = _ascend(start, gradient, sample.threat, learner.step_length(1.0, sample.threat))
    share = 1 - learner.config.clean_share
    loss, adversarial = _learn(learner, sample, attacked, share, attacked=True)
    return StepStats(clean + loss, logits, adversarial, attacked)


def _learn_from(learner: Learner, sample: Sample, attacked: Tensor) -> StepStats:
    loss, logits = _learn(learner, sample, attacked, 1.0)
    return StepStats(loss, None, logits, attacked)


def _ascend(start: Tensor, gradient: Tensor, threat: ThreatModel, length: float) -> Tensor:
    """Step from ``start``, clamp to [0, 1], but do not project: noise may leave the eps ball."""
    return (start + length * threat.ascend(gradient)).clamp_(0, 1)


def _align(learner: Learner, sample: Sample) -> None:
    """Add the gradient of 1 - cos(input gradients at x and near x) (GradAlign, 2020)."""
    near = sample.random_start()
    here = learner.gradient(sample.images, sample.labels, graph=True).flatten(1)
    there = learner.gradient(near, sample.labels, graph=True).flatten(1)
    penalty = (1 - F.cosine_similarity(here, there, dim=1)).mean()
    scaled = learner.config.gradalign * sample.weight * penalty
    scaled.backward()  # type: ignore[no-untyped-call]
