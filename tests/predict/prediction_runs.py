"""Archives, a small network and predictions, as fixtures, and what is in their folders."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from key_files import write_key
from networks import CLASSES, SIDE, network
from PIL import Image

from medspark.images.phantom import ArchiveSummary, PhantomConfig, write_archive
from medspark.models.checkpoint import describe, save_classifier
from medspark.predict.folder import PredictionFolder

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from medspark.workflows.predict import PredictResult

Settings = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> ArchiveSummary:
    """An archive of all kinds of files, some of them damaged."""
    folder = tmp_path_factory.mktemp("phantom") / "archive"
    return write_archive(folder, PhantomConfig(count=60, size=32))


@pytest.fixture(scope="session")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_key(tmp_path_factory.mktemp("key") / "key", "predictions")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a network whose answers differ from image to image."""
    folder, made = tmp_path_factory.mktemp("network") / "model", network()
    card = describe(made, classes=CLASSES, height=SIDE, width=SIDE)
    save_classifier(folder, made, card.model_copy(update={"temperature": 1.5}))
    return folder


@pytest.fixture(scope="session")
def settings(model: Path, key_file: Path) -> Settings:
    """Return a function that returns the settings of a prediction of ``source``."""

    def settings(source: Path | str, answers: Path, **more: Any) -> dict[str, Any]:
        privacy = {"key_file": key_file, "quarantine_file": private(answers, "quarantine")}
        made = {
            "model": str(model),
            "source": str(source),
            "answers": str(answers),
            "paths_file": private(answers, "paths"),
            "privacy": privacy,
        }
        return made | more

    return settings


@pytest.fixture(scope="session")
def run(spark: SparkSession, settings: Settings) -> Callable[..., PredictResult]:
    """Return a function that predicts on Spark."""
    from medspark.predict.config import PredictConfig
    from medspark.workflows.predict import Prediction

    def run(source: Path | str, answers: Path, **more: Any) -> PredictResult:
        config = PredictConfig.model_validate(settings(source, answers, **more))
        return Prediction(config).run(spark)

    return run


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """An archive of four pictures and a file that is none."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(4):
        picture(folder / f"mary-{number}.png", number)
    (folder / "notes.txt").write_text("no image")
    return folder


def picture(path: Path, number: int) -> None:
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def rows(answers: Path) -> list[dict[str, Any]]:
    """Return the committed answers and quarantined files."""
    manifest = PredictionFolder(str(answers)).manifest()
    assert manifest
    names = (*manifest.answers, *manifest.quarantine)
    return [row for name in names for row in pq.ParquetFile(answers / name).read().to_pylist()]


def by_path(answers: Path) -> dict[Path, dict[str, Any]]:
    """Return the rows by the path of the file, which the private list tells."""
    with private(answers, "paths").open(encoding="utf-8", newline="") as file:
        paths = {row["file_key"]: Path(row["path"]) for row in csv.DictReader(file)}
    found = {paths[row["file_key"]]: row for row in rows(answers)}
    assert len(found) == len(rows(answers)) == len(paths)
    return found


def private(answers: Path, name: str) -> Path:
    return answers.with_name(f"{answers.name}-private") / f"{name}.csv"
