"""Make the built-in data: a synthetic archive, ingested and sharded like a user's archive."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from pydantic import Field
from pyspark.sql import SparkSession

from medspark import ownership
from medspark.config import Config
from medspark.job import write_result
from medspark.lock import locked
from medspark.shards import manifest
from medspark.spark.cluster import available_cores

__all__ = ["DemoConfig", "check_demo", "demo_folder", "demo_shards", "ingest_sum"]

logger = logging.getLogger(__name__)


class DemoConfig(Config):
    """The built-in data of a run without --shards."""

    folder: Path = Field(Path("build/demo"), description="folder for archive, samples and shards")
    count: int = Field(2000, ge=10, description="images of the synthetic archive")
    image_size: int = Field(64, ge=16, description="height and width of the shards, in pixels")
    seed: int = Field(0, description="seed of the synthetic archive")


def demo_folder(config: DemoConfig) -> Path:
    """Return the folder of the demo's archive, samples and shards."""
    return config.folder / f"{config.count}-images-{config.image_size}px-seed-{config.seed}"


def check_demo(config: DemoConfig) -> None:
    """Raise UsageError if the demo's folder holds other files."""
    ownership.check(demo_folder(config), "demo data")


def demo_shards(spark: SparkSession, config: DemoConfig) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the demo's shards and the ingest result; make both if missing."""
    folder = demo_folder(config)
    shards, ingested = folder / "shards", folder / "ingest.json"
    if not ingested.exists() or not (shards / manifest.NAME).exists():
        ownership.claim(folder, "demo data")
        with locked(folder):
            _make(spark, config, folder, shards, ingested)
    return shards, dict(json.loads(ingested.read_text(encoding="utf-8")))


def ingest_sum(ingested: dict[str, Any]) -> str:
    """Return the sum of samples, duplicates and quarantined files, which equals the files seen."""
    parts = " + ".join(f"{ingested[key]} {key}" for key in ("samples", "duplicates", "quarantined"))
    return f"{ingested['files_seen']} files seen = {parts}"


def _make(
    spark: SparkSession, config: DemoConfig, folder: Path, shards: Path, ingested: Path
) -> None:
    # Imported here, because a training on existing shards needs no DICOM decoders.
    from medspark.images.deidentify import Privacy
    from medspark.images.phantom import PhantomConfig, write_archive
    from medspark.ingest.archive import open_archive
    from medspark.ingest.config import IngestConfig
    from medspark.ingest.pipeline import ingest
    from medspark.sharding.build import make_shards, open_samples
    from medspark.sharding.config import ShardConfig

    archive, samples = folder / "archive", str(folder / "samples")
    if not (archive / "labels.csv").exists():
        logger.info("writing %d synthetic radiographs to %s", config.count, archive)
        logging.getLogger("openjpeg").setLevel(logging.WARNING)
        phantom = PhantomConfig(count=config.count, seed=config.seed, processes=available_cores())
        write_archive(archive, phantom)
    privacy = Privacy(quarantine_file=folder / "quarantine.csv")
    # The phantom's patients are invented. A fixed public key splits them the same everywhere.
    result = ingest(
        spark,
        open_archive(
            IngestConfig(
                source=str(archive),
                labels=str(archive / "labels.csv"),
                samples=samples,
                image_size=config.image_size,
                privacy=privacy,
            ),
            key=bytes(32),
        ),
    )
    shard_config = ShardConfig(samples=samples, shards=shards)
    make_shards(spark, shard_config, open_samples(shard_config))
    write_result(ingested, result)
