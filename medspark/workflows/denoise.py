"""Train a denoiser and a detector for a trained model on shards: jobs/denoise.py."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from medspark.defend.denoise.config import DenoiseConfig, DenoiseFit, JudgeConfig
from medspark.defend.denoise.result import DenoiseResult
from medspark.defend.detect.conformal import needed
from medspark.errors import UsageError
from medspark.evaluate.config import through_denoiser
from medspark.models.card import PLAIN, read_card
from medspark.models.config import ModelConfig
from medspark.remote import AnyPath
from medspark.shards.manifest import Manifest, read_manifest
from medspark.train.config import RecipeSettings
from medspark.workflows.job_settings import SparkTrainingConfig
from medspark.workflows.train_at import TrainAtConfig, train_at

__all__ = ["DenoiseAtConfig", "DenoiseTraining", "denoise", "training_of"]

_RATE = 3e-3  # a denoiser learns from the beginning, with little data


class DenoiseAtConfig(SparkTrainingConfig, RecipeSettings):
    """A denoiser and a detector for one model, on one dataset of shards."""

    decides_weights: ClassVar = frozenset({"model", "denoise"})
    decides_report: ClassVar = frozenset({"judge"})
    decides_nothing: ClassVar = frozenset({
        "output", "shards", "run_dir", "resume", "overwrite", "launch", "spark", "track",
    })  # fmt: skip

    model: AnyPath = Field(
        description="folder of the trained model to guard, as train_at writes it"
    )
    shards: AnyPath = Field(description="folder that jobs/shard.py wrote")
    denoise: DenoiseConfig = DenoiseConfig()
    judge: JudgeConfig = JudgeConfig()
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


class DenoiseTraining(TrainAtConfig):
    """A training of a denoiser before a network that does not learn."""

    rank_function: ClassVar[str] = "medspark.defend.denoise.fit:fit"
    rank_config: ClassVar = DenoiseFit
    result_class: ClassVar = DenoiseResult
    chooses_recipe: ClassVar = False

    decides_weights: ClassVar = frozenset({"denoise"})
    decides_report: ClassVar = frozenset({"judge"})

    denoise: DenoiseConfig
    judge: JudgeConfig


def denoise(config: DenoiseAtConfig) -> DenoiseResult:
    """Train as ``config`` says, as a training whose network is the model behind a denoiser.

    Raises UsageError for an error in the settings, the model or the shards before Spark starts,
    and RunError, naming the rank and the cause, if the training fails.
    """
    card, manifest = read_card(config.model, kinds=PLAIN), read_manifest(config.shards)
    if difference := card.misfit(manifest):
        raise UsageError(f"The model in {config.model} does not fit: {difference}.")
    _check(config, manifest)
    result = train_at(training_of(config))
    assert isinstance(result, DenoiseResult)
    return result


def training_of(config: DenoiseAtConfig) -> DenoiseTraining:
    """Return the training of a denoiser before the model of ``config``."""
    card, evaluate, train = read_card(config.model), config.evaluate, config.train
    if "lr" not in train.model_fields_set:
        train = train.model_copy(update={"lr": _RATE})
    shared = {
        name: getattr(config, name)
        for name in DenoiseTraining.model_fields
        if hasattr(config, name)
    }
    placed = {
        "train": train,
        "model": ModelConfig(
            name=card.architecture, weights=str(config.model.resolve()), dropout=card.dropout
        ),
        "evaluate": evaluate.model_copy(update={"attacks": through_denoiser(evaluate.attacks)}),
    }
    return DenoiseTraining(**(shared | placed))


def _check(config: DenoiseAtConfig, manifest: Manifest) -> None:
    """Raise UsageError for settings that do not fit a denoiser or the number of images."""
    if config.attack.eps <= 0:
        raise UsageError("attack.eps: a denoiser learns from attacks, so eps is larger than 0.")
    if config.train.dual_bn:
        raise UsageError("train.dual_bn: the classifier behind a denoiser does not learn.")
    held_out = manifest.splits.get("val")
    split = held_out if held_out is not None and held_out.rows else manifest.splits["train"]
    images = min(config.judge.images, split.rows)
    if images < needed(config.judge.fpr):
        raise UsageError(
            f"judge.fpr: a rate of {config.judge.fpr:g} needs {needed(config.judge.fpr)} "
            f"validation images for the threshold, and there are {images}; give a larger rate."
        )
