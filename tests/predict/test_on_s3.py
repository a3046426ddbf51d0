"""Predictions on an archive of an object store, with the model and the answers in it too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from prediction_runs import private

from medspark import storage
from medspark.predict.config import PredictConfig
from medspark.predict.folder import PredictionFolder
from medspark.workflows.predict import Prediction, PredictResult

pytestmark = [pytest.mark.spark, pytest.mark.slow]


def upload(folder: Path, url: str) -> str:
    for path in folder.iterdir():
        system, place = storage.filesystem(f"{url}/{path.name}")
        system.put_file(str(path), place)
    return url


def answers_of(url: str) -> list[dict[str, Any]]:
    manifest = PredictionFolder(url).manifest()
    assert manifest
    system, place = storage.filesystem(url)
    names = (*manifest.answers, *manifest.quarantine)
    rows = [pq.read_table(f"{place}/{name}", filesystem=system).to_pylist() for name in names]
    return [row for table in rows for row in table]


def test_every_file_of_a_store_has_one_answer_and_none_is_asked_twice(
    s3_spark, bucket, settings, model, pictures, tmp_path
):
    source = upload(pictures, f"{bucket}/archive")
    asked = settings(source, tmp_path / "answers", model=upload(model, f"{bucket}/model"))
    config = PredictConfig.model_validate(asked | {"answers": f"{bucket}/answers"})

    def run() -> PredictResult:
        return Prediction(config).run(s3_spark)

    first, again = run(), run()

    assert (first.answered, first.quarantined, first.done_now) == (4, 1, 5)
    assert (again.answered, again.quarantined, again.done_now) == (4, 1, 0)
    rows = answers_of(f"{bucket}/answers")
    assert len(rows) == len({row["file_key"] for row in rows}) == 5
    listed = private(tmp_path / "answers", "paths").read_text()
    assert listed.count(f"{bucket}/archive/") == 5
    system, place = storage.filesystem(f"{bucket}/answers")
    assert not [name for name in system.find(place) if "/staging/" in name or "/work/" in name]
