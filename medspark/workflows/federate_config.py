"""The settings of jobs/federate.py."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from medspark.config import Config
from medspark.evaluate.config import AttackSettings, DecisionConfig
from medspark.federate.config import FederationConfig
from medspark.job import JobConfig
from medspark.remote import AnyPath
from medspark.spark.session import SparkConfig
from medspark.track.config import TrackConfig

__all__ = ["FederateConfig", "ValidationConfig"]


class ValidationConfig(Config):
    """The network on validation images, clean and under PGD at ``attack.eps``, between rounds."""

    every: int = Field(1, ge=0, description="rounds between validations; the last has one; 0: none")
    images: int = Field(256, ge=1, description="validation images to attack")
    steps: int = Field(10, ge=1, description="PGD steps")

    def due(self, round: int, rounds: int) -> bool:
        """Return whether ``round`` of ``rounds`` is followed by a validation."""
        return self.every > 0 and ((round + 1) % self.every == 0 or round + 1 == rounds)


class FederateConfig(JobConfig, FederationConfig):
    """Federated training on one dataset of shards, each client as a part of a Spark task."""

    decides_report: ClassVar = frozenset({"evaluate", "validate_rounds", "decision"})
    decides_nothing: ClassVar = frozenset({
        "output", "shards", "run_dir", "resume", "overwrite", "spark", "track", "tasks",
    })  # fmt: skip

    shards: AnyPath = Field(description="folder that jobs/shard.py wrote")
    run_dir: Path | None = Field(
        None,
        description="folder for rounds and the model, shared by all machines; by default a new "
        "one beside the output: x.run, x-2.run, ...",
    )
    resume: Literal["auto", "never"] = Field(
        "never",
        description="auto resumes an interrupted federation in run_dir, and returns the result of "
        "a finished one",
    )
    overwrite: bool = Field(
        False, description="replace the run in run_dir, finished or not; other files there stay"
    )
    tasks: int = Field(0, ge=0, description="Spark tasks that train at once; 0: all slots")
    validate_rounds: ValidationConfig = ValidationConfig()
    evaluate: AttackSettings = AttackSettings()
    decision: DecisionConfig = DecisionConfig()
    spark: SparkConfig = SparkConfig()
    track: TrackConfig = TrackConfig()
