"""A registered model is a function of Spark SQL, through ``mlflow.pyfunc.spark_udf``."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medspark.models.backbones import build
from medspark.models.checkpoint import describe, save_classifier
from medspark.models.config import ModelConfig
from medspark.models.file_predictor import FilePredictor
from medspark.track.config import TrackConfig
from medspark.track.runs import tracked
from medspark.track.spool import ModelEntry, RunEntry

pytestmark = [pytest.mark.spark, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CLASSES = ("normal", "pneumonia")
TYPE = "label string, probability double, normal double, pneumonia double, error string"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    network = build(ModelConfig(name="test_resnet"), num_classes=2, channels=1)
    save_classifier(folder, network, describe(network, classes=CLASSES, height=32, width=32))
    return folder


@pytest.fixture
def registered(model: Path, tmp_path: Path) -> str:
    """The name of a registered model, in the store that MLflow uses now."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    entry = ModelEntry(
        folder=model,
        loader="medspark.models.predictor:Predictor.load",
        input_shape=(32, 32, 1),
        outputs=2,
        file_loader="medspark.models.file_predictor:FilePredictor.load",
        classes=CLASSES,
        register_as="chest",
    )
    config = TrackConfig(uri=uri, system_metrics=False, patience_seconds=0)
    with tracked(tmp_path / "run", config, RunEntry(name="chest")) as run:
        run.end("FINISHED", model=entry)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    return str(run.reference["registered"])


def test_sql_asks_a_registered_model_about_the_bytes_of_files(
    spark, registered: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(5):
        noise = np.random.default_rng(number).integers(0, 256, (40, 40), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "in" / f"{number}.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")

    chest = mlflow.pyfunc.spark_udf(spark, registered, result_type=TYPE, env_manager="local")
    spark.udf.register("chest", chest)
    files = spark.read.format("binaryFile").load(str(tmp_path / "in"))
    files.createOrReplaceTempView("files")
    rows = spark.sql("SELECT path, chest(base64(content)) AS answer FROM files").collect()

    served = FilePredictor.load(model)
    assert len(rows) == 6
    for path, answer in rows:
        content = Path(path.removeprefix("file:")).read_bytes()
        (wanted,) = served([base64.b64encode(content).decode()])
        if "error" in wanted:
            assert answer.asDict() == dict.fromkeys(answer.asDict()) | {"label": ""} | wanted
        else:
            assert answer.error == ""
            assert answer.label == wanted.pop("label")
            assert {name: answer[name] for name in wanted} == pytest.approx(wanted, abs=1e-5)
    served.close()


@pytest.mark.parametrize(("in_task", "turns"), [(False, [150]), (True, [64, 64, 22])])
def test_a_task_of_spark_takes_as_many_turns_as_its_files_need(
    monkeypatch: pytest.MonkeyPatch, in_task: bool, turns: Sequence[int]
) -> None:
    from medspark.track import served_files  # MLflow warns of its own types when it is imported

    asked: list[int] = []

    class Predict:
        columns = ("label", "error")

        def __call__(self, files: list[str]) -> list[dict[str, Any]]:
            asked.append(len(files))
            return [{"label": text} for text in files]

    monkeypatch.setattr(served_files, "_in_spark_task", lambda: in_task)
    served = served_files.ServedFiles()
    served._predict = Predict()
    texts = [str(number) for number in range(150)]

    found = served.predict(None, pd.DataFrame({"image": texts}))  # type: ignore[arg-type]

    assert asked == turns
    assert list(found["label"]) == texts
