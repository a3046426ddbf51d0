"""Remove patients from samples, and name the shards and models that had learnt from them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field
from pyspark.sql import SparkSession

from medspark.errors import RunError, UsageError
from medspark.ingest.forget import Dataset, ForgetConfig, Patients, forget
from medspark.job import Result
from medspark.remote import AnyPath, any_path
from medspark.shards.local import local_shards
from medspark.shards.manifest import read_manifest
from medspark.shards.schema import read_patients
from medspark.track.config import TrackConfig

if TYPE_CHECKING:
    from medspark.track.learnt import Learnt

__all__ = ["ForgetResult", "ForgetWorkConfig", "forget_patients"]

_LOGGER = logging.getLogger(__name__)


class ForgetWorkConfig(ForgetConfig):
    """Remove patients from a sample dataset, and name what was made from their images."""

    shards: tuple[AnyPath, ...] = Field(
        (),
        description="shard folders to look into, separated by commas, besides those that runs in "
        "MLflow name",
    )
    track: TrackConfig = TrackConfig()


class StaleShards(Result):
    """A shard folder that holds images of removed patients."""

    folder: str
    digest: str
    images: int


class StaleRun(Result):
    """A run that read such a folder, and the versions of registered models that came of it.

    ``certain`` is false if the folder is gone or was made anew, so that nobody can look.
    """

    run_id: str
    name: str
    digest: str
    models: tuple[str, ...]
    certain: bool


class ForgetResult(Result):
    """The result document of jobs/forget.py."""

    patients: int = Field(description="patients of the dataset who were removed")
    unknown_lines: tuple[int, ...] = Field(description="lines of the file that name none of them")
    samples: int
    duplicates: int
    quarantined: int
    files: int
    parts: int = Field(0, description="files with pixels that were written again")
    bytes: int = Field(0, description="size of these files")
    dry_run: bool
    shards: tuple[StaleShards, ...]
    runs: tuple[StaleRun, ...]
    mlflow_error: str | None = None


def forget_patients(
    spark: SparkSession, config: ForgetWorkConfig, dataset: Dataset, patients: Patients
) -> ForgetResult:
    """Remove the patients, and return what was removed and what had been made from their images."""
    removed = forget(spark, dataset, patients, dry_run=config.dry_run)
    runs, error = _runs(config.track.uri)
    folders = {str(path): path for path in config.shards}
    folders |= {run.source: any_path(run.source) for run in runs if run.source}
    stale: list[StaleShards] = []
    digests: set[str] = set()
    for name, path in folders.items():
        try:
            found = _stale(name, path, patients)
        except UsageError as problem:
            if path in config.shards:
                raise
            _LOGGER.debug("not looked into: %s", problem)
            continue
        digests.add(found.digest)
        stale += [found] if found.images else []
    return ForgetResult(
        **removed,
        dry_run=config.dry_run,
        shards=tuple(stale),
        runs=tuple(_stale_runs(runs, {each.digest for each in stale}, digests)),
        mlflow_error=error,
    )


def _runs(uri: str | None) -> tuple[list[Learnt], str | None]:
    from medspark.track.learnt import runs_with_data  # imports mlflow

    try:
        return runs_with_data(uri), None
    except RunError as error:
        return [], str(error)


def _stale(name: str, folder: Path, patients: Patients) -> StaleShards:
    """Return how many images of the patients are in a shard folder."""
    manifest = read_manifest(folder)
    files = [shard.path for split in manifest.splits.values() for shard in split.shards]
    place = local_shards(folder)
    images = sum(int(np.isin(read_patients(place / path), patients.keys).sum()) for path in files)
    return StaleShards(folder=name, digest=manifest.digest, images=images)


def _stale_runs(runs: Iterable[Learnt], stale: set[str], seen: set[str]) -> Iterable[StaleRun]:
    """Yield the runs on ``stale`` digests, and those on digests that nobody can look into."""
    for run in runs:
        if run.digest in stale or run.digest not in seen:
            yield StaleRun(
                run_id=run.run_id,
                name=run.name,
                digest=run.digest,
                models=run.models,
                certain=run.digest in stale,
            )
