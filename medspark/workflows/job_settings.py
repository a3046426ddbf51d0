"""The settings that all jobs share which train on Spark."""

from __future__ import annotations

from medspark.job import JobConfig
from medspark.launch.distributor import LaunchConfig
from medspark.spark.session import SparkConfig
from medspark.track.config import TrackConfig

__all__ = ["SparkTrainingConfig"]


class SparkTrainingConfig(JobConfig):
    """The number of processes, the Spark session, and the tracking of the run."""

    launch: LaunchConfig = LaunchConfig()
    spark: SparkConfig = SparkConfig()
    track: TrackConfig = TrackConfig()
