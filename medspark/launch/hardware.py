"""Describe the hardware that a run's measurements come from."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from pyspark.sql import SparkSession

from medspark.spark.cluster import available_cores, is_local
from medspark.spark.slots import slots_of

__all__ = ["hardware"]


def hardware(spark: SparkSession) -> str:
    """Return cores and processor of this machine, its GPUs, and the size of a cluster."""
    words = f"{available_cores()} cores of {_processor()}"
    if torch.cuda.is_available():
        words += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    if not is_local(spark):
        slots = slots_of(spark)
        words = f"Spark cluster of {slots.executors} executors, {slots.cores} cores; driver {words}"
    return words


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
