"""The settings that every job has which starts training on Spark."""

from __future__ import annotations

from medspark.job import JobConfig
from medspark.launch.distributor import LaunchConfig
from medspark.spark.session import SparkConfig
from medspark.track.config import TrackConfig

__all__ = ["SparkTrainingConfig"]


class SparkTrainingConfig(JobConfig):
    """How many processes are started, by which Spark, and where the run is logged."""

    launch: LaunchConfig = LaunchConfig()
    spark: SparkConfig = SparkConfig()
    track: TrackConfig = TrackConfig()
