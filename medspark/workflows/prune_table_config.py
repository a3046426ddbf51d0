"""The configuration of the table of prunings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from medspark import ownership
from medspark.remote import AnyPath
from medspark.train.config import RecipeSettings
from medspark.train.prune.config import PruneConfig, PruneMethod, check_pruning
from medspark.workflows.job_settings import SparkTrainingConfig
from medspark.workflows.prune import check_model_to_prune, training_of
from medspark.workflows.train_at import check

__all__ = ["PruneTableConfig", "check_table"]

Share = Annotated[float, Field(ge=0, lt=1)]


class PruneTableConfig(SparkTrainingConfig, RecipeSettings):
    """Pruning of several models by several methods on one dataset of shards."""

    decides_weights: ClassVar = frozenset({"models", "methods", "sparsities", "seeds", "prune"})
    decides_nothing: ClassVar = frozenset({
        "output", "shards", "folder", "launch", "spark", "track",
    })  # fmt: skip

    models: dict[str, AnyPath] = Field(
        min_length=1, description="folders of the trained models to prune, by names for the table"
    )
    shards: AnyPath = Field(description="folder that jobs/shard.py wrote")
    methods: tuple[PruneMethod, ...] = Field(
        ("rsr", "magnitude", "lasso", "noise", "hydra"), description="methods, by commas"
    )
    sparsities: tuple[Share, ...] = Field(
        (0.0, 0.5, 0.85, 0.9, 0.95), description="shares of zeros, by commas; 0 only fine-tunes"
    )
    seeds: tuple[int, ...] = Field(
        (0,), min_length=1, description="seeds, by commas, in place of seed"
    )
    prune: PruneConfig = Field(
        PruneConfig(), description="settings of the methods; the table sets method and sparsity"
    )
    folder: Path = Field(
        Path("build/prune_table"), description="folder for the networks, the cells and the table"
    )


def check_table(config: PruneTableConfig) -> None:
    """Raise UsageError for every mistake that shows before Spark starts."""
    for model in config.models.values():
        check_model_to_prune(model, config.shards)
    restores = config.train.monitor.action == "restore"
    for method in config.methods:
        check_pruning(config.prune.model_copy(update={"method": method}), restores=restores)
    check(training_of(config, next(iter(config.models.values())), config.prune))
    sources = {"the shards": config.shards} | {
        f"the model {n}": m for n, m in config.models.items()
    }
    ownership.apart(sources, {"the folder of the table": config.folder})
