"""Archives and their ingests, as fixtures, and what is in the datasets."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from key_files import write_key
from PIL import Image

from medspark.images.phantom import ArchiveSummary, PhantomConfig, write_archive
from medspark.ingest import ledger
from medspark.ingest.archive import open_archive
from medspark.ingest.config import IngestConfig
from medspark.ingest.pipeline import ingest
from medspark.ingest.sample_set import SampleSet

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ArchiveSummary]:
    folder = tmp_path_factory.mktemp("phantom") / "archive"
    return folder, write_archive(folder, PhantomConfig(count=120, size=32))


@pytest.fixture(scope="session")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_key(tmp_path_factory.mktemp("key") / "key", "archive")


@pytest.fixture(scope="session")
def run(spark: SparkSession, key_file: Path) -> Any:
    def run(source: Path, samples: Path, **values: Any) -> dict[str, Any]:
        config = {
            "source": str(source),
            "samples": str(samples),
            "image_size": 16,
            "privacy": {"key_file": key_file, "quarantine_file": listed(samples)},
            "guarded": False,
        }
        return ingest(spark, open_archive(IngestConfig.model_validate(config | values)))

    return run


@pytest.fixture(scope="session")
def ingested(
    run: Any, phantom: tuple[Path, ArchiveSummary], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    samples = tmp_path_factory.mktemp("ingested") / "samples"
    return samples, run(phantom[0], samples, labels=str(phantom[0] / "labels.csv"))


def live(samples: Path) -> dict[str, dict[str, Any]]:
    """Return the samples of the ledger, by key, with their pixels."""
    manifest = SampleSet(str(samples)).manifest()
    assert manifest
    parts = {part.path: pq.read_table(samples / part.path).to_pylist() for part in manifest.parts}
    kept = [row for row in standing(samples) if row["outcome"] == "sample"]
    assert all(parts[row["part"]][row["row"]]["sample_key"] == row["sample_key"] for row in kept)
    return {row["sample_key"]: parts[row["part"]][row["row"]] for row in kept}


def standing(samples: Path) -> list[dict[str, Any]]:
    """Return the rows of the ledger that no later row replaces."""
    manifest = SampleSet(str(samples)).manifest()
    assert manifest
    replaced = {
        tuple(row[name] for name in ledger.IDENTITY)
        for file in manifest.superseded
        for row in pq.read_table(samples / file).to_pylist()
    }
    rows = [row for file in manifest.ledger for row in pq.read_table(samples / file).to_pylist()]
    return [row for row in rows if tuple(row[n] for n in ledger.IDENTITY) not in replaced]


def listed(samples: Path) -> Path:
    """Return the path of a dataset's private quarantine list."""
    return samples.with_name(f"{samples.name}.csv")


def quarantine(samples: Path) -> dict[str, dict[str, Any]]:
    """Return the quarantine list's entries, by absolute path."""
    with listed(samples).open(encoding="utf-8", newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(value, value + 256, dtype=np.uint8).reshape(16, 16)).save(file, "PNG")
    return file.getvalue()


def put(folder: Path, **files: int) -> None:
    """Write images; ``A__x=3`` is the file A/x with image number 3."""
    for name, value in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(value))


def values(samples: Path) -> list[tuple[str, int]]:
    return sorted((row["label"], row["pixels"][0]) for row in live(samples).values())


def wait_for(condition: Callable[[], Any], seconds: float = 90, *, pause: float = 0.005) -> Any:
    """Wait until ``condition`` returns something true, and return it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(pause)
    raise TimeoutError
