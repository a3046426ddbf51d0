"""The interface of a training step, which all modes and distillation methods implement.

A step rule gets the ``Learner``, which holds the network, and a ``Sample``. It leaves the gradient
of ``sample.weight`` times the mean loss in ``.grad`` and returns ``StepStats``. It neither updates
weights nor reads results from the device. Under DDP exactly one of its backward passes all-reduces;
all others run within ``learner.quiet()``. ``train.adversarial.take_step`` calls the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medspark.attacks.losses import Loss
from medspark.attacks.pgd import pgd
from medspark.attacks.threat import ThreatModel
from medspark.data.batch import Integers
from medspark.models.kernels.processor import processor
from medspark.train.class_answers import ClassAnswers
from medspark.train.config import AdversarialConfig, TrainPrecision
from medspark.train.noise import keyed_noise
from medspark.train.objective import Objective

__all__ = ["Learner", "Sample", "StepRule", "StepStats", "bf16_pays", "learn", "pass_type",
           "pgd_images"]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """The input of one step: augmented images (B, C, H, W) in [0, 1] and their labels.

    Labels are classes (B,), findings (B, K), or probabilities (B, 1, K) of classes of mixed images.
    ``rows`` (B,) are the images' row numbers in the dataset. ``weight`` multiplies the mean loss.
    ``threat`` holds the eps of this step. ``key`` seeds the step's noise. ``start`` holds the
    attacked images of the batch's previous replay.
    """

    images: Tensor
    labels: Tensor
    rows: Integers
    weight: float
    threat: ThreatModel
    key: int
    start: Tensor | None = None

    def random_start(self) -> Tensor:
        """Return a keyed random start within the threat model, for each image."""
        noise = keyed_noise(self.images, self.rows, key=self.key)
        return self.threat.random_start(self.images, noise.add_(1).mul_(0.5))


@dataclass(frozen=True, slots=True)
class StepStats:
    """The loss and the logits (B, K) of a step, left on the device so that no step waits for it.

    ``loss`` is weighted. ``attacked`` are the attacked images, None in standard training.
    """

    loss: Tensor
    clean: Tensor | None
    adversarial: Tensor | None
    attacked: Tensor | None = None


@dataclass
class Learner:
    """The network in training, with or without DDP around it, and its loss.

    ``objective`` maps logits and labels to a mean loss. Passes compute in the type ``autocast``,
    or in float32 if it is None. ``step_rule`` replaces ``config.mode``, as in distillation.
    ``answers`` are the mean answers per class that mode ikl weighs with, and its settings.
    """

    model: nn.Module
    objective: Objective
    config: AdversarialConfig = field(default_factory=AdversarialConfig)
    autocast: torch.dtype | None = None
    step_rule: StepRule | None = None
    answers: ClassAnswers = field(default_factory=ClassAnswers)

    @property
    def bare(self) -> nn.Module:
        """The network without DDP: passes through it do not communicate."""
        if isinstance(self.model, DistributedDataParallel):
            wrapped: nn.Module = self.model.module
            return wrapped
        return self.model

    def quiet(self) -> AbstractContextManager[None]:
        """Return a context without all-reduce; run both forward and backward pass within it."""
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return nullcontext()

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss and the logits, both in float32 at any training precision."""
        logits = self.logits(self.model, images)
        return self.objective(logits, labels), logits.detach()

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the logits (B, K) of ``model`` at the training precision."""
        with self.precise(images):
            logits: Tensor = model(images)
        return logits.float() if logits.dtype == torch.bfloat16 else logits

    def precise(self, images: Tensor) -> AbstractContextManager[None]:
        """Return the context in which passes of ``images`` compute at the training precision."""
        return nullcontext() if self.autocast is None else _precision(images, self.autocast)

    def gradient(self, images: Tensor, labels: Tensor, *, graph: bool = False) -> Tensor:
        """Return the gradient of the loss at ``images``; parameters get no gradient."""
        x = images.detach().requires_grad_(True)
        with nullcontext() if graph else self.fixed():
            loss = self.objective(self.logits(self.bare, x), labels)
            (gradient,) = torch.autograd.grad(loss, x, create_graph=graph)
        return gradient

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Compute no parameter gradients within this context; attacks need none."""
        learning = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in learning:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)

    def noisy(self, sample: Sample, reach: float) -> Tensor:
        """Return the images plus uniform noise of at most ``reach`` per pixel."""
        noise = keyed_noise(sample.images, sample.rows, key=sample.key)
        return noise.mul_(reach).add_(sample.images)

    def step_length(self, default: float, threat: ThreatModel) -> float:
        """Return the attack's step length in pixel units; ``default`` is in units of eps."""
        return (self.config.step_length or default) * threat.eps


# The type of a step rule, see the module's docstring.
StepRule = Callable[[Learner, Sample], StepStats]


def learn(
    loss: Tensor,
    sample: Sample,
    *,
    clean: Tensor | None = None,
    adversarial: Tensor | None = None,
    attacked: Tensor | None = None,
) -> StepStats:
    """Run the backward pass of ``loss`` times ``sample.weight`` and return the step's StepStats.

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
    """Return images that PGD with ``loss`` finds from a random start, in the current train mode.

    Its passes compute at the training precision, as the step's other passes do.
    """
    with learner.fixed():
        return pgd(
            partial(learner.logits, learner.bare),
            sample.images,
            sample.labels,
            threat=sample.threat,
            steps=learner.config.inner_steps,
            start=sample.random_start(),
            loss=loss,
        )


def pass_type(precision: TrainPrecision, device: torch.device) -> torch.dtype | None:
    """Return the type in which passes compute under autocast, None for float32."""
    lower = bf16_pays(device) if precision == "auto" else precision == "bf16"
    return torch.bfloat16 if lower else None


def bf16_pays(device: torch.device) -> bool:
    """Return whether bf16 passes are faster than float32; a CPU needs products of bf16 numbers."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return processor() != "plain"


@contextmanager
def _precision(images: Tensor, dtype: torch.dtype) -> Iterator[None]:
    # Older versions of torch would reuse casts made without gradient in passes that need one.
    keep = torch.is_grad_enabled()
    with torch.autocast(images.device.type, dtype=dtype, cache_enabled=keep):
        yield
