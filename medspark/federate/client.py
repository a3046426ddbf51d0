"""Train a client in one round, from the round's weights and the client's rows to new weights.

A client is a plain function. It runs as a Spark task, in a loop, or inside a hospital. No image and
no gradient leaves it. Batches, noise and dropout are keyed by the seed and the round, so training a
client twice gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medspark.data.batch import Integers, Pixels, to_unit
from medspark.data.config import AugmentConfig
from medspark.data.native import MappedSplit, NativeReader
from medspark.errors import UsageError
from medspark.federate.adversary import Adversary, Backdoor, Known
from medspark.federate.aggregate.rule import Vector
from medspark.federate.calfat import Calibrated, calfat
from medspark.federate.drift import Drift
from medspark.federate.local import LocalConfig
from medspark.federate.resident import Resident
from medspark.federate.weights import (
    Weights,
    apply,
    difference,
    pack_kept,
    reestimate,
    unpack_kept,
)
from medspark.seeding import derive
from medspark.shards.plan import EpochPlan
from medspark.train.adversarial import take_step
from medspark.train.learner import Learner, Sample, pass_type
from medspark.train.objective import BinaryCrossEntropy, CrossEntropy
from medspark.train.optimise import Descent, clip_gradients

__all__ = ["Answer", "Liar", "Memory", "Task", "optimiser_of", "set_rate", "train_client"]

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Memory:
    """The state that a client keeps private between its rounds; empty before the first.

    ``norms`` are its batch norms under the policy ``local``, ``control`` (d,) is its control
    variate in SCAFFOLD.
    """

    norms: Weights | None = None
    control: Vector | None = None


@dataclass(frozen=True)
class Task:
    """The server's request: the round's weights (d,) and, in SCAFFOLD, the server control (d,).

    ``rounds`` is the number of rounds of the federation, over which a schedule goes.
    """

    weights: Weights
    round: int = 0
    seed: int = 0
    control: Vector | None = None
    rounds: int = 1


@dataclass(frozen=True)
class Liar:
    """An attacking client: its adversary, and what the adversary knows."""

    adversary: Adversary
    known: Known = field(default_factory=Known)


@dataclass(frozen=True)
class Answer:
    """A client's answer: trained weights (d,), number of images, and mean loss of the last epoch.

    ``control_change`` (d,) is the change of SCAFFOLD's control variate; ``memory`` stays with the
    client. ``pattern`` (C, h, w) is the trigger that an adversary prepared, for the simulation.
    """

    weights: Weights
    images: int
    steps: int
    loss: float
    memory: Memory
    control_change: Vector | None = None
    pattern: Tensor | None = None


def train_client(
    model: nn.Module | Resident,
    rows: MappedSplit,
    task: Task,
    config: LocalConfig,
    *,
    augmentation: AugmentConfig | None = None,
    memory: Memory | None = None,
    liar: Liar | None = None,
) -> Answer:
    """Return the answer to ``task`` of the client that holds ``rows``.

    ``model`` is any network of the architecture, on the CPU, possibly prepared as a ``Resident``;
    the exchanged weights overwrite its own. All else that it holds is afterwards as before, so it
    can serve one client after the other. Raises UsageError if the client has no image, if findings
    are to be calibrated, or if the round comes after the schedule's last.
    """
    if len(rows) == 0:
        raise UsageError("A client without images cannot train.")
    if config.schedule == "one_cycle" and task.round >= task.rounds:
        raise UsageError(
            f"The schedule ends after {task.rounds} rounds; this is round {task.round + 1}."
        )
    network = Resident.of(model)
    with network.tensors(config.batch_norm).private_restored():
        return _answer(network, rows, task, config, augmentation, memory or Memory(), liar)


def _answer(
    network: Resident,
    rows: MappedSplit,
    task: Task,
    config: LocalConfig,
    augmentation: AugmentConfig | None,
    memory: Memory,
    liar: Liar | None,
) -> Answer:
    model, tensors = network.own, network.tensors(config.batch_norm)
    tensors.unpack(task.weights)
    if memory.norms is not None:
        unpack_kept(model, memory.norms, config.batch_norm)
    if config.batch_norm == "reestimate":
        reestimate(model, _clean(rows, config.batch_size))
    if liar is not None:
        liar = replace(liar, known=liar.adversary.prepare(model, *_whole(rows), liar.known))
    drift = Drift(model, config, ours=memory.control, server=task.control)
    steps, loss, way = _train(network, rows, task, config, drift, augmentation, liar)
    weights = tensors.pack()
    control = drift.control(weights, task.weights, way)
    if liar is not None:
        sent = liar.adversary.send(difference(weights, task.weights), liar.known)
        weights = apply(task.weights, sent)
    norms = pack_kept(model, "local") if config.batch_norm == "local" else None
    moved = None if control is None else control - drift.ours
    pattern = None if liar is None else liar.known.pattern
    return Answer(weights, len(rows), steps, loss, Memory(norms, control), moved, pattern)


def _train(
    network: Resident,
    rows: MappedSplit,
    task: Task,
    config: LocalConfig,
    drift: Drift,
    augmentation: AugmentConfig | None,
    liar: Liar | None,
) -> tuple[int, float, float]:
    """Train ``network`` in place; return steps, loss of the last epoch, and sum of the rates."""
    learner = _learner(network.trained, torch.from_numpy(rows.labels), config)
    parameters = network.learning
    kernels = [p for p in parameters if p.ndim > 1]
    optimiser = optimiser_of(kernels, [p for p in parameters if p.ndim <= 1], config)
    _awake(network, config)
    _forget_gradients(parameters)
    steps, way, total, images_seen = 0, 0.0, 0.0, 0
    # Epochs are numbered across rounds, so that no round repeats the order of another.
    first = sum(config.epochs_in(earlier) for earlier in range(task.round))
    passes = config.epochs_in(task.round)
    passes = passes if liar is None else liar.adversary.passes(passes)
    replays = config.train.replays if config.train.mode == "free" else 1
    # A schedule takes all rounds to be as long as this one.
    in_round = passes * replays * EpochPlan(len(rows), config.batch_size, task.seed).steps
    for epoch in range(first, first + passes):
        total, images_seen = 0.0, 0
        for images, labels, numbers in _batches(rows, task, config, augmentation, liar, epoch):
            start: Tensor | None = None
            for _ in range(replays):
                # torch.manual_seed takes 100 times as long: it also seeds devices nobody uses.
                torch.default_generator.manual_seed(derive(task.seed, "dropout", task.round, steps))
                key = derive(task.seed, "noise", task.round, steps)
                place = task.round * in_round + steps, task.rounds * in_round
                rate, threat = config.rate_at(*place, round=task.round), config.threat_at(*place)
                sample = Sample(images, labels, numbers, 1.0, threat, key, start)
                network.fold()
                stats = take_step(learner, sample)
                network.pull_back()
                start = stats.attacked
                drift.correct()
                if config.clip_grad:
                    clip_gradients(parameters, config.clip_grad)
                set_rate(optimiser, rate)
                optimiser.step()
                _forget_gradients(parameters)
                steps, way = steps + 1, way + rate
                _constrain(network, task, config, liar, steps)
            total += float(stats.loss) * len(images)
            images_seen += len(images)
    _constrain(network, task, config, liar, 0)
    return steps, total / max(images_seen, 1), way


def _batches(
    rows: MappedSplit,
    task: Task,
    config: LocalConfig,
    augmentation: AugmentConfig | None,
    liar: Liar | None,
    epoch: int,
) -> Iterator[tuple[Tensor, Tensor, Integers]]:
    """Yield an epoch's images in [0, 1], labels and row numbers; a liar's are poisoned."""
    size = config.batch_size
    if liar is None:
        reader = NativeReader(
            rows, global_batch=size, seed=task.seed, rank=0, world=1, augmentation=augmentation
        )
        for together, stored, marks in reader.stretches(epoch):
            sizes = [len(numbers) for numbers in together]
            images = torch.split(to_unit(stored, _CPU), sizes)
            yield from zip(images, torch.split(marks, sizes), together, strict=True)
        return
    whole, labels = liar.adversary.poison(*_whole(rows), liar.known)
    for numbers in EpochPlan(len(whole), size, task.seed, epoch).rank_batches(0, 1):
        taken = torch.from_numpy(numbers)
        yield whole[taken], labels[taken], numbers


def _learner(model: nn.Module, labels: Tensor, config: LocalConfig) -> Learner:
    computed = pass_type(config.precision, _CPU)
    if config.calibrate == "none":
        objective = BinaryCrossEntropy() if labels.ndim == 2 else CrossEntropy()
        return Learner(model, objective, config.train, autocast=computed)
    if labels.ndim == 2:
        raise UsageError("Logits are calibrated for classes, and these images have findings.")
    rule = calfat if config.calibrate == "calfat" else None
    calibrated = Calibrated.to(labels)
    return Learner(model, calibrated, config.train, autocast=computed, step_rule=rule)


def optimiser_of(
    kernels: list[nn.Parameter], others: list[nn.Parameter], config: LocalConfig
) -> torch.optim.AdamW | Descent:
    """Return a client's optimiser; AdamW does not decay the ``others``, norms and biases."""
    decay = config.weight_decay
    if config.optimiser == "sgd":
        every = [*kernels, *others]
        return Descent(every, rate=config.lr, momentum=config.momentum, weight_decay=decay)
    groups: list[dict[str, Any]] = [{"params": kernels}, {"params": others, "weight_decay": 0.0}]
    # It takes a fifth of the time of the plain one, which is a tenth of a small network's step.
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=decay, fused=True)


def set_rate(optimiser: torch.optim.AdamW | Descent, rate: float) -> None:
    """Set the learning rate of a client's optimiser."""
    if isinstance(optimiser, Descent):
        optimiser.rate = rate
        return
    for group in optimiser.param_groups:
        group["lr"] = rate


def _forget_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _awake(network: Resident, config: LocalConfig) -> None:
    """Set training mode; batch norms update their statistics only under average and local."""
    network.trained.train()
    for layer in network.norms:
        layer.train(config.batch_norm in ("average", "local"))


def _constrain(
    network: Resident, task: Task, config: LocalConfig, liar: Liar | None, steps: int
) -> None:
    """Let a backdoor adversary project its network back within bounds, every ``every`` steps."""
    adversary = None if liar is None else liar.adversary
    if liar is None or not isinstance(adversary, Backdoor) or steps % adversary.every:
        return
    tensors = network.tensors(config.batch_norm)
    update = difference(tensors.pack(), task.weights)
    nearer = adversary.constrain(update, liar.known)
    if nearer is not update:
        tensors.unpack(apply(task.weights, nearer))


def _whole(rows: MappedSplit) -> tuple[Tensor, Tensor]:
    images, labels = rows.gather(np.arange(len(rows)))
    return _unit(images), torch.from_numpy(labels)


def _clean(rows: MappedSplit, size: int) -> Iterator[Tensor]:
    for start in range(0, len(rows), size):
        yield _unit(rows.gather(np.arange(start, min(start + size, len(rows))))[0])


def _unit(images: Pixels) -> Tensor:
    return to_unit(torch.from_numpy(images).permute(0, 3, 1, 2), _CPU)
