"""Build the parts of a training: network, loss, step rule, validation and monitor images."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medspark.data.native import MappedSplit
from medspark.data.source import Source
from medspark.errors import UsageError
from medspark.evaluate.deploy import evaluation_copy
from medspark.models.card import Pruning, read_card
from medspark.models.checkpoint import first_network, load_classifier
from medspark.models.classifier import Classifier, freeze_batch_norm
from medspark.models.config import model_folder
from medspark.models.torchvision_ops import import_timm
from medspark.seeding import derive
from medspark.shards.plan import EpochPlan, permute
from medspark.train.config import MIXED_MODES, FitConfig
from medspark.train.distill import distillation_rule
from medspark.train.learner import StepRule
from medspark.train.objective import (
    BinaryCrossEntropy,
    CrossEntropy,
    Objective,
    balanced_positive_weights,
    balanced_weights,
)
from medspark.train.prune.channels import remove_channels
from medspark.train.prune.config import check_pruning
from medspark.train.prune.pruner import Pruner
from medspark.train.world import World

__all__ = [
    "Recipe", "make_network", "make_objective", "make_pruner", "make_pruning", "make_step_rule",
    "validation_split", "watched_images",
]  # fmt: skip

_LOGGER = logging.getLogger(__name__)


def make_network(config: FitConfig, source: Source, world: World) -> Classifier:
    """Return the network to train, its batch norm configured by ``train.batch_norm`` and so on.

    Raises UsageError for batch-norm settings that do not fit the mode, the ranks or the device,
    and for settings of a pruning that exclude each other.
    """
    manifest = source.manifest
    if config.prune is not None:
        check_pruning(config.prune, restores=config.train.monitor.action == "restore")
    torch.manual_seed(derive(config.seed, "weights"))
    model = first_network(
        config.model,
        num_classes=len(manifest.classes),
        channels=manifest.channels,
        size=(manifest.height, manifest.width),
    )
    if config.prune is not None and config.prune.structured:
        image = torch.zeros(1, manifest.channels, manifest.height, manifest.width)
        model = remove_channels(model, image, config.prune.sparsity)
    # The statistics of a network are not those of what pruning leaves of it.
    known = config.model.weights is not None and config.prune is None and not config.train.dual_bn
    frozen = config.train.batch_norm == "frozen" or (
        config.train.batch_norm == "auto" and known and config.attacks
    )
    _check_dual(config, frozen=frozen)
    if frozen:
        freeze_batch_norm(model)
    elif config.train.sync_batch_norm:
        if world.device.type != "cuda":
            raise UsageError("train.sync_batch_norm works between GPUs only.")
        _check_every_rank_sees(config, len(source.split("train")), world)
        # Torch's conversion would lose the activations that timm puts into its batch norms.
        model = import_timm().layers.convert_sync_batchnorm(model)
    return model


def make_objective(config: FitConfig, source: Source, world: World) -> Objective:
    """Return the loss: binary cross-entropy for several findings per image, else cross-entropy."""
    multi_label, weights = source.manifest.multi_label, None
    if config.train.class_weights == "balanced":
        labels = source.split("train").labels
        if multi_label:
            weights = balanced_positive_weights(labels.sum(0).tolist(), len(labels))
        else:
            counts = np.bincount(labels, minlength=len(source.manifest.classes))
            weights = balanced_weights(counts.tolist())
        weights = weights.to(world.device)
    loss = BinaryCrossEntropy if multi_label else CrossEntropy
    return loss(weights, config.train.label_smoothing, config.train.temperature)


def make_step_rule(config: FitConfig, source: Source, world: World) -> StepRule | None:
    """Return the step rule of distillation, or None without a teacher.

    Raises UsageError if the teacher does not fit the dataset.
    """
    if config.distill is None:
        return None
    card = read_card(config.distill.teacher)
    manifest = source.manifest
    if difference := card.misfit(manifest):
        raise UsageError(f"The teacher in {config.distill.teacher} does not fit: {difference}.")
    shape = (2, manifest.channels, manifest.height, manifest.width)
    teacher = load_classifier(config.distill.teacher).to(world.device)
    return distillation_rule(
        config.distill, evaluation_copy(teacher, torch.rand(shape, device=world.device))
    )


def make_pruner(config: FitConfig) -> Pruner:
    """Return what prunes the network, or keeps the zeros of a pruned one, or does nothing."""
    narrowed = config.prune is not None and config.prune.structured
    return Pruner(None if narrowed else config.prune, pruned=_pruned(config) is not None)


@dataclass(frozen=True)
class Recipe:
    """What a training makes of its configuration. Another one trains another kind of network.

    With ``chooses`` the epoch with the best score on validation images is kept, else the last one.
    """

    network: Callable[[FitConfig, Source, World], Classifier] = make_network
    step_rule: Callable[[FitConfig, Source, World], StepRule | None] = make_step_rule
    pruner: Callable[[FitConfig], Pruner] = make_pruner
    chooses: bool = True


def make_pruning(config: FitConfig) -> Pruning | None:
    """Return how the network is pruned, for its card; None if it is not."""
    if config.prune is None:
        before = _pruned(config)
        return before and before.model_copy(update={"noise": False})
    return Pruning(
        method=config.prune.method,
        sparsity=config.prune.sparsity,
        noise=config.prune.noisy,
    )


def _pruned(config: FitConfig) -> Pruning | None:
    """Return how the first weights were pruned; None if they were not."""
    folder = model_folder(config.model)
    return None if folder is None else read_card(folder).pruning


def validation_split(source: Source) -> MappedSplit:
    """Return the split for comparing epochs: validation, or training if there is none."""
    held_out = source.manifest.splits.get("val")
    if held_out is None or held_out.rows == 0:
        _LOGGER.warning("there is no validation split: epochs are compared on training images")
        return source.split("train")
    return source.split("val")


def watched_images(source: Source, config: FitConfig, world: World) -> tuple[Tensor, Tensor]:
    """Return the fixed training images that the monitor attacks, and their labels."""
    split = source.split("train")
    count = min(config.train.monitor.images, len(split))
    rows = permute(np.arange(count), len(split), derive(config.seed, "monitor"))
    return split.tensors(rows, world.device)


def _check_every_rank_sees(config: FitConfig, rows: int, world: World) -> None:
    """Raise UsageError if a rank may have no image in a step: the others would wait for it."""
    fewest = rows // EpochPlan(rows, config.train.batch_size, config.seed).steps
    if fewest < world.size:
        raise UsageError(
            f"train.sync_batch_norm needs an image for each of the {world.size} processes in every "
            f"step, but some steps have {fewest}: start fewer processes, or use a larger "
            "train.batch_size."
        )


def _check_dual(config: FitConfig, *, frozen: bool) -> None:
    other = config.distill or config.prune or config.train.mode not in MIXED_MODES
    if config.train.dual_bn and (frozen or other):
        raise UsageError(
            f"train.dual_bn needs one of the modes {', '.join(MIXED_MODES)}, which learn from "
            "clean and attacked images, unfrozen batch norm, and no pruning."
        )
