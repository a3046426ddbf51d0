"""The training engine: one step from a batch to updated weights.

A step splits the batch into pieces, runs the mode on each, combines the gradients of all ranks,
clips, and updates the weights and their moving average.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from medspark.attacks.losses import correct
from medspark.attacks.threat import ThreatModel
from medspark.data.batch import Batch, to_unit
from medspark.errors import RunError
from medspark.models.classifier import Classifier, batch_norms, freeze_batch_norm
from medspark.models.kernels.fold import fold
from medspark.models.kernels.lower import lower
from medspark.models.kernels.trained_form import TrainedForm
from medspark.seeding import derive
from medspark.train.adversarial import take_step
from medspark.train.awp import WeightPerturbation
from medspark.train.class_answers import ClassAnswers
from medspark.train.config import TrainConfig
from medspark.train.dual_norm import dual
from medspark.train.gradients.interface import Gradients, Piece
from medspark.train.gradients.one_host import OneHost
from medspark.train.gradients.overlapped import Overlapped
from medspark.train.gradients.virtual_shards import VirtualShards
from medspark.train.learner import Learner, Sample, StepRule, StepStats, pass_type
from medspark.train.objective import Objective, hard_labels
from medspark.train.optimise import Average, adamw, clip_gradients, set_rate, step_if_finite
from medspark.train.prune.pruner import Pruner
from medspark.train.schedule import one_cycle, ramp
from medspark.train.state import optimiser_tensors, restore_optimiser
from medspark.train.world import World

__all__ = ["Engine", "Report"]

_LOGGER = logging.getLogger(__name__)

# After so many updates in a row without a finite gradient, training is given up.
_HOPELESS = 20


@dataclass(frozen=True, slots=True)
class Report:
    """The metrics of one step.

    ``figures`` (4,) stay on the device and are summed over ranks later: this rank's share of the
    mean loss, and its numbers of correct clean images, correct attacked images and all images.
    ``gradient_norm`` () stays there too; it is the same on all ranks.
    """

    figures: Tensor
    rate: float
    eps: float
    gradient_norm: Tensor


class Engine:
    """Takes training steps. A step is a function of the weights and of (seed, step, batch).

    A step reads nothing from the device, so that the next one can be sent while a GPU computes.
    """

    def __init__(
        self,
        model: Classifier,
        *,
        config: TrainConfig,
        threat: ThreatModel,
        objective: Objective,
        image_shape: tuple[int, int, int],
        total_steps: int,
        seed: int,
        world: World,
        settle: bool = False,
        step_rule: StepRule | None = None,
        pruner: Pruner | None = None,
    ) -> None:
        model = model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        example = torch.rand(2, *image_shape, device=world.device)
        self._form: TrainedForm = (
            dual(model, deployed=config.deploy_norm) if config.dual_bn else fold(model, example)
        )
        self._config = config
        self._replays = config.replays if config.mode == "free" else 1
        self._total = total_steps * self._replays
        self._pruner = pruner or Pruner(None, pruned=False)
        rates = [self._rate(update) for update in range(self._total)]
        self._form = self._pruner.attach(self._form, rates)
        self.model = self._form.trained
        exact = config.elastic == "exact"
        pieces = config.virtual_shards if exact else world.size * config.accumulate
        if world.device.type == "cpu":
            lower(self.model, example, batch_size=-(-config.batch_size // pieces))
        passed: Any = torch.compile(self.model) if config.compile else self.model
        self.gradients = _gradients(passed, config, world)
        self.optimiser = adamw(self.model, config)
        self.average = Average(self.model, config.ema) if config.ema > 0 else None
        self._threat = threat
        self._seed = seed
        self._world = world
        self._device = world.device
        self._unread: list[tuple[int, Tensor]] = []  # updates and the norms of their gradients
        self._lost = 0
        self._blank = example[:1]
        self._learnt = 0  # steps with an image since the batch-norm statistics were averaged
        self._settles_at = math.ceil(config.eps_warmup * total_steps) if settle else None
        computed = pass_type(config.precision, world.device)
        self.precision = "fp32" if computed is None else "bf16"
        self._perturbation = WeightPerturbation(
            self.model,
            gamma=config.awp,
            begins=math.ceil(config.awp_after * self._total),
            keep_zeros=self._pruner.prunes,
        )
        self._below_head = _below_head(self.model) if config.head_steps else []
        self._learner = Learner(
            model=self.gradients.model,
            objective=objective,
            config=config,
            autocast=computed,
            step_rule=step_rule,
            answers=ClassAnswers(config.ikl),
        )

    @property
    def _weighs_answers(self) -> bool:
        return self._config.mode == "ikl" and self._learner.step_rule is None

    def exposed_seconds(self) -> float:
        """Return the seconds per step that this rank only waited for other ranks' gradients."""
        return self.gradients.exposed_seconds()

    def step(self, batch: Batch, number: int) -> Report:
        """Learn from ``batch``, as step ``number`` (from 0) of the run."""
        if self._settles_at is not None and number >= self._settles_at:
            self._settle()
        self.model.train()
        if self._weighs_answers:
            self._learner.answers.begin(batch.epoch, self._world)
        batch = replace(
            batch,
            images=to_unit(batch.images, self._device),
            labels=batch.labels.to(self._device, non_blocking=True),
        )
        pieces = self.gradients.pieces(batch)
        self._learnt += len(batch.labels) > 0
        starts: dict[int, Tensor | None] = {}
        for replay in range(self._replays):
            update = number * self._replays + replay
            rate = self._rate(update)
            eps = self._threat.eps * ramp(update, self._total, share=self._config.eps_warmup)
            threat = self._threat.model_copy(update={"eps": eps})
            with self._perturbation.moved(update):
                figures = self._learn(batch, pieces, update, threat, starts)
            norm = self._update(update, rate)
        return Report(figures, rate, eps, norm)

    def _learn(
        self,
        batch: Batch,
        pieces: list[Piece],
        update: int,
        threat: ThreatModel,
        starts: dict[int, Tensor | None],
    ) -> Tensor:
        """Leave the gradient of ``update`` in ``.grad``; return the figures of its Report.

        ``starts`` holds the attacked images of the batch's previous replay, by piece.
        """
        figures = torch.zeros(4, device=self._device)
        self.gradients.begin()
        for piece in pieces:
            # Seed dropout per piece, so that checkpoints need not hold the generator's state.
            torch.manual_seed(derive(self._seed, "dropout", update, piece.number))
            sample = Sample(
                images=batch.images[piece.rows],
                labels=batch.labels[piece.rows],
                rows=batch.rows[piece.rows],
                weight=piece.weight,
                threat=threat,
                key=derive(self._seed, "noise", update),
                start=starts.get(piece.number),
            )
            with self.gradients.learning(piece, last=piece is pieces[-1]):
                if piece.empty:
                    self.gradients.attend(self._blank)
                    continue
                stats = take_step(self._learner, sample)
                starts[piece.number] = stats.attacked
                figures += _figures(stats, sample, piece.part / piece.weight)
        self.gradients.finish()
        return figures

    def _settle(self) -> None:
        """Freeze batch norm, so that from now on attacks see the network that is deployed."""
        if not self.model.batch_norm_frozen:
            self.average_buffers()
            freeze_batch_norm(self.model)

    @contextmanager
    def deployable(self) -> Iterator[Classifier]:
        """Yield the network in the form to save: unfolded, with averaged weights if configured."""
        if self.average is None:
            yield self._unfolded()
            return
        self.average.swap(self.model)
        try:
            yield self._unfolded()
        finally:
            self.average.swap(self.model)

    @property
    def complete(self) -> bool:
        """Whether the network may be kept: one that is to be pruned is not yet before the cut."""
        return self._pruner.cut

    def noise_scales(self) -> dict[str, Tensor]:
        """Return the learnt scales of noisy weights, by name; none without such noise."""
        return self._pruner.noise()

    def average_buffers(self) -> None:
        """Give all ranks the mean of their moving batch-norm statistics, and what ikl counts.

        A rank's weight is the number of steps with an image since the last call. With elastic exact
        the statistics are already the same on all ranks, bit for bit.
        """
        if self._weighs_answers:
            self._learner.answers.share(self._world)
        moving = [
            buffer
            for layer in batch_norms(self.model)
            if not self.model.batch_norm_frozen
            for buffer in layer.buffers()
            if buffer.is_floating_point()
        ]
        if not moving or self._world.size == 1 or self._config.elastic == "exact":
            return
        learnt = torch.tensor([float(self._learnt)], device=self._device)
        mine = torch.cat([b.flatten() for b in moving]) * learnt
        *parts, times = torch.split(
            self._world.sum(torch.cat([mine, learnt])), [*(b.numel() for b in moving), 1]
        )
        self._learnt = 0
        if times > 0:
            for buffer, values in zip(moving, parts, strict=True):
                buffer.copy_((values / times).view_as(buffer))

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that a resumed run needs, by name."""
        kept = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        kept |= {f"norms/{name}": value for name, value in self._form.norms().items()}
        kept |= optimiser_tensors(self.optimiser, self.model)
        if self.average is not None:
            kept |= {f"average/{name}": value for name, value in self.average.values.items()}
        kept |= self._perturbation.tensors() | self._learner.answers.tensors()
        return kept | self._pruner.tensors()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the tensors that ``tensors`` returned."""
        self._form.kept.load_state_dict(_below("norms/", tensors), strict=False)
        self.model.load_state_dict(_below("model/", tensors))
        restore_optimiser(self.optimiser, self.model, tensors)
        if self.average is not None:
            self.average.restore(_below("average/", tensors))
        self._perturbation.restore(tensors)
        self._learner.answers.restore(tensors, self._world)
        self._pruner.restore(tensors)

    @property
    def noise(self) -> float:
        """The largest training noise, in units of eps."""
        return self._learner.config.noise

    @noise.setter
    def noise(self, reach: float) -> None:
        """Set the largest training noise, in units of eps."""
        self._learner.config = self._learner.config.model_copy(update={"noise": reach})

    def _rate(self, update: int) -> float:
        return one_cycle(update, self._total, peak=self._config.lr, rising=self._config.lr_rise)

    def _unfolded(self) -> Classifier:
        model = self._form.unfold()
        # Pruned weights of the average are zero only as far as it has forgotten the others.
        self._pruner.apply(dict(model.named_parameters()))
        return model

    def _update(self, update: int, rate: float) -> Tensor:
        if update < self._config.head_steps * self._replays:
            # Dropped only here: under DDP every parameter must take part in the backward pass.
            for parameter in self._below_head:
                parameter.grad = None
        self._pruner.hold_back()
        self._perturbation.remember(update)
        norm = clip_gradients(self.model.parameters(), self._config.clip_grad)
        set_rate(self.optimiser, rate)
        step_if_finite(self.optimiser, norm)
        self._pruner.after(update, rate)
        if self.average is not None:
            self.average.update(self.model, update)
        self.optimiser.zero_grad(set_to_none=True)
        self._unread.append((update, norm))
        return norm

    def check(self) -> None:
        """Read the norms of the gradients since the last call, and warn of those not finite.

        Raises RunError if 20 updates in a row had no finite gradient. All ranks have the same
        gradients, so all of them raise.
        """
        if not self._unread:
            return
        updates, norms = zip(*self._unread, strict=True)
        self._unread = []
        for update, finite in zip(updates, torch.stack(norms).isfinite().tolist(), strict=True):
            self._lost = 0 if finite else self._lost + 1
            if finite:
                continue
            _LOGGER.warning("update %d is skipped: its gradient is not finite", update)
            if self._lost >= _HOPELESS:
                raise RunError(
                    f"Training diverged: {_HOPELESS} updates in a row had no finite gradient. "
                    "Lower train.lr."
                )


def _gradients(model: nn.Module, config: TrainConfig, world: World) -> Gradients:
    if config.elastic == "exact":
        return VirtualShards(model, count=config.virtual_shards, world=world)
    count = config.accumulate
    shared = OneHost.found(model, count=count, world=world)
    return shared or Overlapped(model, count=count, world=world)


def _below_head(model: Classifier) -> list[nn.Parameter]:
    backbone: Any = model.backbone
    head = {id(parameter) for parameter in backbone.get_classifier().parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in head]


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@torch.no_grad()
def _figures(stats: StepStats, sample: Sample, scale: float) -> Tensor:
    def right(logits: Tensor | None) -> Tensor:
        if logits is None:
            return torch.zeros((), device=stats.loss.device)
        return correct(logits, hard_labels(sample.labels)).sum()

    # Filled on the device: a copy from the host would make the host wait for it.
    count = torch.full((), float(len(sample.labels)), device=stats.loss.device)
    return torch.stack([stats.loss * scale, right(stats.clean), right(stats.adversarial), count])
