"""The contract of a training step, which every way to train keeps: modes, and distillation.

A step rule gets the ``Learner``, which holds the network, and a ``Sample``. It leaves the gradient
of ``sample.weight`` times the mean loss in ``.grad`` and returns ``StepStats``. It neither updates
weights nor reads results from the device. Under DDP exactly one of its backward passes all-reduces;
all others are made within ``learner.quiet()``. ``train.adversarial.take_step`` calls the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medspark.attacks.losses import Loss
from medspark.attacks.pgd import pgd
from medspark.attacks.threat import ThreatModel
from medspark.data.batch import Integers
from medspark.train.config import AdversarialConfig
from medspark.train.noise import keyed_noise
from medspark.train.objective import Objective

__all__ = ["Learner", "Sample", "StepRule", "StepStats", "learn", "pgd_images"]


@dataclass(frozen=True, slots=True)
class Sample:
    """What one step learns from: augmented images (B, C, H, W) in [0, 1] and their labels.

    Labels are classes (B,) or findings (B, K); ``rows`` (B,) are the images' numbers in the data.
    ``weight`` multiplies the mean loss of these images; ``threat`` carries the eps of this step;
    ``key`` names the step's noise; ``start`` is where the last replay of the batch left off.
    """

    images: Tensor
    labels: Tensor
    rows: Integers
    weight: float
    threat: ThreatModel
    key: int
    start: Tensor | None = None

    def random_start(self) -> Tensor:
        """Return a keyed random start within the threat model of each image."""
        noise = keyed_noise(self.images, self.rows, key=self.key)
        return self.threat.random_start(self.images, noise.add_(1).mul_(0.5))


@dataclass(frozen=True, slots=True)
class StepStats:
    """What a step saw, left on the device so that reading it can wait; logits are (B, K).

    ``loss`` is weighted. ``attacked`` are the images learnt from, None in plain training.
    """

    loss: Tensor
    clean: Tensor | None
    adversarial: Tensor | None
    attacked: Tensor | None = None


@dataclass
class Learner:
    """The network in training, with or without DDP around it, and how its loss is taken.

    ``objective`` turns logits and labels into a mean loss. Passes compute in ``autocast``, or in
    float32. ``step_rule`` takes the place of ``config.mode``, as for learning from a teacher.
    """

    model: nn.Module
    objective: Objective
    config: AdversarialConfig = field(default_factory=AdversarialConfig)
    autocast: torch.dtype | None = None
    step_rule: StepRule | None = None

    @property
    def bare(self) -> nn.Module:
        """The network without DDP: a pass through it is no collective."""
        if isinstance(self.model, DistributedDataParallel):
            wrapped: nn.Module = self.model.module
            return wrapped
        return self.model

    def quiet(self) -> AbstractContextManager[None]:
        """Accumulate gradients without all-reduce; holds for forward and backward together."""
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return nullcontext()

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss and the logits, in float32 whatever the passes compute in."""
        logits = self.logits(self.model, images)
        return self.objective(logits, labels), logits.detach()

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the logits (B, K) of ``model`` at the training precision."""
        with _precision(images.device.type, self.autocast):
            logits: Tensor = model(images)
        return logits.float() if logits.dtype == torch.bfloat16 else logits

    def gradient(self, images: Tensor, labels: Tensor, *, graph: bool = False) -> Tensor:
        """Return the loss's gradient at ``images``; the parameters get none."""
        x = images.detach().requires_grad_(True)
        with nullcontext() if graph else self.fixed():
            loss = self.objective(self.logits(self.bare, x), labels)
            (gradient,) = torch.autograd.grad(loss, x, create_graph=graph)
        return gradient

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Have passes compute no gradient of a parameter, as attacks need none."""
        learning = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in learning:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)

    def noisy(self, sample: Sample, reach: float) -> Tensor:
        """Return the images with uniform noise of at most ``reach`` on each pixel."""
        noise = keyed_noise(sample.images, sample.rows, key=sample.key)
        return noise.mul_(reach).add_(sample.images)

    def step_length(self, default: float, threat: ThreatModel) -> float:
        """Return the length of the attack's step, in pixel units."""
        return (self.config.step_length or default) * threat.eps


# One way to learn from a sample: see the module's docstring.
StepRule = Callable[[Learner, Sample], StepStats]


def learn(
    loss: Tensor,
    sample: Sample,
    *,
    clean: Tensor | None = None,
    adversarial: Tensor | None = None,
    attacked: Tensor | None = None,
) -> StepStats:
    """Make the backward pass of ``loss``, weighted as ``sample`` says, and return what was seen.

    ``clean`` and ``adversarial`` are the logits (B, K) of clean and of ``attacked`` images.
    """
    scaled = loss * sample.weight
    scaled.backward()  # type: ignore[no-untyped-call]
    return StepStats(
        scaled.detach(),
        None if clean is None else clean.detach(),
        None if adversarial is None else adversarial.detach(),
        attacked,
    )


def pgd_images(learner: Learner, sample: Sample, loss: Loss) -> Tensor:
    """Return images that PGD with ``loss`` finds from a random start for the network as it is."""
    with learner.fixed():
        return pgd(
            learner.bare,
            sample.images,
            sample.labels,
            threat=sample.threat,
            steps=learner.config.inner_steps,
            start=sample.random_start(),
            loss=loss,
        )


@contextmanager
def _precision(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    # Older versions of torch keep casts made without gradient for passes that need one.
    keep = torch.is_grad_enabled()
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None, cache_enabled=keep):
        yield
