"""The objects that all parts of one run share: configuration, ranks, data, journal and clock."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medspark.data.native import MappedSplit
from medspark.data.source import Source
from medspark.train.config import FitConfig
from medspark.train.meter import Recorder
from medspark.train.prepare import validation_split
from medspark.train.timeline import Timeline
from medspark.train.world import World

__all__ = ["RunSetup", "set_up"]


@dataclass(frozen=True)
class RunSetup:
    """The shared objects of one run, on one rank."""

    config: FitConfig
    world: World
    journal: Recorder
    source: Source
    validation: MappedSplit
    test: MappedSplit
    timeline: Timeline

    @property
    def model_folder(self) -> Path:
        """Folder of the chosen network."""
        return self.config.run_dir / "model"


def set_up(
    config: FitConfig, world: World, journal: Recorder, source: Source, timeline: Timeline
) -> RunSetup:
    """Return the setup of a run on ``source``. Raises UsageError if a split is missing."""
    held_out, test = validation_split(source), source.split("test")
    return RunSetup(config, world, journal, source, held_out, test, timeline)
