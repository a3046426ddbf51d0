"""An archive with planted names, its dataset, and a search for the names in it."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from key_files import write_key
from PIL import Image

from medspark.images.deidentify import Pseudonyms
from medspark.images.frame import sha256_of
from medspark.ingest.archive import open_archive
from medspark.ingest.config import IngestConfig
from medspark.ingest.pipeline import ingest
from medspark.ingest.sample_set import SampleSet, SamplesManifest
from medspark.sharding.build import make_shards, open_samples
from medspark.sharding.config import ShardConfig

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# Planted in typical places: a folder, file names, patients, sites, sessions.
SECRETS = ("DOE^JANE", "MRN-40718", "St Elsewhere")
KEPT_SITE = "Teaching Hospital"
LABELS = "path,label,patient_id,site\n"


def image(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (np.arange(256).reshape(16, 16) + value) % 256
    Image.fromarray(pixels.astype(np.uint8)).save(path, "PNG")


def put(folder: Path, number: int) -> Path:
    """Write an archive: eight images, a label conflict, a copy, a broken file, a label table."""
    lines = []
    for n in range(8):
        name = f"DOE^JANE/MRN-40718-{n}.png"
        image(folder / name, 16 * number + n)
        lines.append(
            f"{name},{'AB'[n % 2]},MRN-40718-{number}-{n},{(SECRETS[2], KEPT_SITE)[n % 2]}"
        )
    for name, label in (("DOE^JANE/torn.png", "A"), ("also-torn.png", "B"), ("copy.png", "A")):
        image(folder / name, 16 * number + (0 if name == "copy.png" else 200))
        lines.append(f"{name},{label},MRN-40718-{number}-{name},{SECRETS[2]}")
    (folder / "DOE^JANE" / "broken.png").write_bytes(b"")
    lines.append("DOE^JANE/broken.png,A,MRN-40718-9,")
    (folder / "labels.csv").write_text(LABELS + "\n".join(lines) + "\n")
    return folder


class Runs:
    """Ingests into one dataset."""

    def __init__(self, spark: SparkSession, folder: Path) -> None:
        self.spark, self.folder, self.samples = spark, folder, folder / "samples"
        self.list, self.key = folder / "list.csv", write_key(folder / "key", "privacy")
        self.pseudonyms = Pseudonyms(bytes.fromhex(self.key.read_text()))

    def __call__(self, source: Path, **values: Any) -> dict[str, Any]:
        config = {
            "source": str(source),
            "samples": str(self.samples),
            "labels": str(source / "labels.csv"),
            "image_size": 16,
            "guarded": False,
            "privacy": {
                "key_file": self.key, "quarantine_file": self.list, "sites": [KEPT_SITE],
            },
        }  # fmt: skip
        return ingest(self.spark, open_archive(IngestConfig.model_validate(config | values)))

    def manifest(self) -> SamplesManifest:
        manifest = SampleSet(str(self.samples)).manifest()
        assert manifest
        return manifest

    def rows(self, kind: str) -> list[dict[str, Any]]:
        files = getattr(self.manifest(), kind)
        return [row for name in files for row in pq.read_table(self.samples / name).to_pylist()]

    def listed(self) -> dict[str, str]:
        with self.list.open(encoding="utf-8", newline="") as file:
            return {row["path"]: row["file_key"] for row in csv.DictReader(file)}


@pytest.fixture
def runs(spark: SparkSession, tmp_path: Path) -> Runs:
    return Runs(spark, tmp_path)


def everything(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield the bytes of all files, names included, and the values of tables with their footers."""
    for path in folder.rglob("*"):
        yield path, str(path.relative_to(folder)).encode()
        if path.is_file():
            yield path, path.read_bytes()
            if path.suffix == ".parquet":
                told = pq.read_table(path).to_pydict(), pq.read_metadata(path).to_dict()
                yield path, repr(told).encode()


def leaks(folder: Path, *secrets: str) -> list[str]:
    """Return the files that contain one of ``secrets``."""
    return [
        f"{secret} in {path}"
        for path, content in everything(folder)
        for secret in secrets
        if secret.encode() in content
    ]


def digests(source: Path) -> list[str]:
    """Return the digests that can be computed from the files: SHA-256 of bytes and of pixels."""
    files = list(source.rglob("*.png"))
    whole = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return whole + [pixels_of(path) for path in files if path.stat().st_size]


def pixels_of(path: Path) -> str:
    return sha256_of(np.asarray(Image.open(path)), "MONOCHROME2")


def shards_of(runs: Runs, folder: Path) -> dict[str, Any]:
    """Write shards, and return their rows by sample key."""
    values = {"samples": str(runs.samples), "shards": folder, "split": {"test": 0.4}}
    config = ShardConfig.model_validate(values)
    make_shards(runs.spark, config, open_samples(config))
    rows = [row for path in folder.rglob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return {row["sample_key"]: row for row in rows}
