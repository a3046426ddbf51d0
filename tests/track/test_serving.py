"""A registered model, served as MLflow serves it, answers image files with probabilities."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image
from pydicom.data import get_testdata_file

from medspark.models.backbones import build
from medspark.models.checkpoint import calibrate, describe, save_classifier
from medspark.models.config import ModelConfig
from medspark.models.file_predictor import FilePredictor
from medspark.track.config import TrackConfig
from medspark.track.runs import tracked
from medspark.track.spool import ModelEntry, RunEntry

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CLASSES = ("normal", "pneumonia")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    network = build(ModelConfig(name="resnet10t"), num_classes=2, channels=1)
    save_classifier(folder, network, describe(network, classes=CLASSES, height=32, width=32))
    calibrate(folder, 2.0)
    return folder


@pytest.fixture(scope="module")
def registered(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The reference of a run that registered its model."""
    folder = tmp_path_factory.mktemp("registry")
    config = TrackConfig(
        uri=f"sqlite:///{folder / 'mlflow.db'}", system_metrics=False, patience_seconds=0
    )
    entry = ModelEntry(
        folder=model,
        loader="medspark.models.predictor:Predictor.load",
        input_shape=(32, 32, 1),
        outputs=2,
        file_loader="medspark.models.file_predictor:FilePredictor.load",
        classes=CLASSES,
        card="# a model card",
        register_as="chest",
        alias="candidate",
    )
    with tracked(folder / "run", config, RunEntry(name="chest")) as run:
        run.end("FINISHED", model=entry)
    return dict(run.reference)


@pytest.fixture(scope="module")
def server(registered: dict[str, Any], serve: Callable[..., str]) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ("models", "serve", "-m", registered["registered"], "--env-manager", "local")
    return serve(*command, page="ping", MLFLOW_TRACKING_URI=registered["uri"], PATH=path)


def _ask(server: str, *files: str) -> list[dict[str, Any]]:
    body = json.dumps({"dataframe_records": [{"image": text} for text in files]}).encode()
    request = urllib.request.Request(
        f"{server}/invocations", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return list(json.load(answer)["predictions"])


def test_the_registered_version_has_an_alias_and_its_card(registered: dict[str, Any]) -> None:
    version = MlflowClient(registered["uri"]).get_model_version_by_alias("chest", "candidate")

    assert registered["registered"] == "models:/chest@candidate"
    assert version.description == "# a model card"
    assert version.run_id == registered["run_id"]


def test_a_served_model_answers_dicom_and_png_with_calibrated_probabilities(
    server: str, model: Path
) -> None:
    dicom = Path(str(get_testdata_file("CT_small.dcm"))).read_bytes()
    picture = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(noise).save(picture, "PNG")
    files = [base64.b64encode(content).decode() for content in (dicom, picture.getvalue())]

    answers = _ask(server, *files)

    for answer, expected in zip(answers, FilePredictor.load(model)(files), strict=True):
        assert answer["label"] == expected["label"]
        assert answer["probability"] == pytest.approx(expected["probability"], abs=1e-6)
        assert answer["normal"] + answer["pneumonia"] == pytest.approx(1, abs=1e-6)


def test_what_is_no_image_is_refused_with_the_reason(server: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        _ask(server, "no image!")

    assert "image 0 is not base64" in refused.value.read().decode()
