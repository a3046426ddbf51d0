"""The configuration of a prediction: the model, the archive, and the folder of the answers."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from medspark.config import Config
from medspark.images.deidentify import Privacy
from medspark.ingest.config import ArchiveLimits
from medspark.track.config import TrackConfig

__all__ = ["PredictConfig"]


class PredictConfig(Config):
    """Apply a model to the files of an archive that has no labels."""

    model: str = Field(
        description="folder of a model (trained, pruned, or exported), or an MLflow URI"
    )
    source: str = Field(description="folder of the archive: a path, or a URL (s3a, abfss, hdfs)")
    answers: str = Field(
        description="folder of the answers, created, continued or brought up to date"
    )
    inventory: str | None = Field(
        None, description="table of path, size, modified; replaces listing the source"
    )
    batch_size: int = Field(
        64, ge=1, le=4096, description="images that the network answers at once"
    )
    paths_file: Path | None = Field(
        None,
        description="private table of the files' keys and paths, outside of the answers; by "
        "default in ~/.medspark/paths of the driver",
    )
    limits: ArchiveLimits = Field(default_factory=ArchiveLimits)
    privacy: Privacy = Field(default_factory=Privacy)
    guarded: bool = Field(
        True, description="decode in a child process, so that no file can end or stall a worker"
    )
    track: TrackConfig = Field(default_factory=TrackConfig)
