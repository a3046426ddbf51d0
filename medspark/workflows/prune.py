"""Prune a trained model while it is fine-tuned on shards: jobs/prune.py."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from medspark.errors import UsageError
from medspark.models.card import PLAIN, WEIGHTS, read_card
from medspark.models.config import ModelConfig, tensor_shapes
from medspark.models.local import local_model
from medspark.remote import AnyPath
from medspark.shards.manifest import read_manifest
from medspark.train.config import RecipeSettings, TrainConfig
from medspark.train.kinds import kind_of
from medspark.train.prune.config import PruneConfig, check_pruning
from medspark.train.result import TrainResult
from medspark.workflows.job_settings import SparkTrainingConfig
from medspark.workflows.train_at import TrainAtConfig, train_at

__all__ = [
    "PruneAtConfig", "PruneTraining", "check_model_to_prune", "prune", "training_of",
]  # fmt: skip

# The peak of the learning rate where the user has chosen none. What pruning leaves has to learn
# again: with the 3e-4 of other trainings, validation scores at 85 % (chest X-rays of 32 px, six
# epochs against 2/255) were .50, .65 and .71 for MobileNet-V2 by magnitude, lasso and hydra; with
# this they are .72, .85 and .87. The network without pruning had .82. ResNet18, lasso: .89 and .91.
_RATE = 1e-3


class PruneAtConfig(SparkTrainingConfig, RecipeSettings, PruneConfig):
    """Pruning of one model on one dataset of shards."""

    decides_weights: ClassVar = frozenset({"model", *PruneConfig.model_fields})
    decides_nothing: ClassVar = frozenset({
        "output", "shards", "run_dir", "resume", "overwrite", "launch", "spark", "track",
    })  # fmt: skip

    model: AnyPath = Field(
        description="folder of the trained model to prune, as train_at writes it"
    )
    shards: AnyPath = Field(description="folder that jobs/shard.py wrote")
    run_dir: Path | None = Field(
        None,
        description="folder for checkpoints, logs and the model, shared by all machines; by "
        "default a new one beside the output: x.run, x-2.run, ...",
    )
    resume: Literal["auto", "never"] = Field(
        "never",
        description="auto resumes an interrupted run in run_dir, and returns the result of a "
        "finished one",
    )
    overwrite: bool = Field(
        False, description="replace the run in run_dir, finished or not; other files there stay"
    )


class PruneTraining(TrainAtConfig):
    """A training that prunes its network."""

    decides_weights: ClassVar = frozenset({"prune"})

    prune: PruneConfig


def prune(config: PruneAtConfig) -> TrainResult:
    """Prune as ``config`` says, as a training that starts from its model; return the result.

    Raises UsageError for an error in the settings, the model or the shards before Spark starts,
    and RunError, naming the rank and the cause, if the training fails.
    """
    how = PruneConfig(**{name: getattr(config, name) for name in PruneConfig.model_fields})
    check_model_to_prune(config.model, config.shards)
    check_pruning(how, restores=config.train.monitor.action == "restore")
    return train_at(training_of(config, config.model, how))


def training_of(settings: SparkTrainingConfig, model: Path, how: PruneConfig) -> PruneTraining:
    """Return the training that prunes the ``model`` folder; ``settings`` has all its settings."""
    card = read_card(model)
    start = ModelConfig(name=card.architecture, weights=str(model.resolve()), dropout=card.dropout)
    shared = {
        name: getattr(settings, name)
        for name in PruneTraining.model_fields
        if hasattr(settings, name)
    }
    train: TrainConfig = shared["train"]
    if "lr" not in train.model_fields_set and kind_of(card.architecture) is None:
        train = train.model_copy(update={"lr": _RATE})
    return PruneTraining(**(shared | {"model": start, "prune": how, "train": train}))


def check_model_to_prune(model: Path, shards: Path) -> None:
    """Raise UsageError unless ``model`` is a folder with weights to prune that fits ``shards``."""
    if difference := read_card(model, kinds=PLAIN).misfit(read_manifest(shards)):
        raise UsageError(f"The model in {model} does not fit: {difference}.")
    if not any(len(shape) > 1 for shape in _weights(model)):
        raise UsageError(f"The model in {model} has no convolution or linear layer to prune.")


def _weights(folder: Path) -> list[tuple[int, ...]]:
    """Return the shapes of the weights in the model ``folder``, by the file's header."""
    shapes = tensor_shapes(local_model(folder) / WEIGHTS)
    return [shape for name, shape in shapes.items() if name.endswith(".weight")]
