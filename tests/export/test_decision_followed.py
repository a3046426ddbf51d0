"""A decision, from training to every place where the model answers: one threshold, one answer."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from array_shards import write_arrays
from networks import images
from PIL import Image

from medspark.export.artifact import write_artifact
from medspark.export.backends import float_graph, int8_graph
from medspark.export.judge import Judge
from medspark.export.onnx import export_onnx
from medspark.export.predict import predictions
from medspark.export.runtime import DeployedModel
from medspark.models.card import read_card
from medspark.models.checkpoint import load_classifier
from medspark.models.file_predictor import FilePredictor
from medspark.models.prediction import decided
from medspark.models.predictor import Predictor
from medspark.shards.schema import SPLITS
from medspark.track.config import TrackConfig
from medspark.track.runs import tracked
from medspark.track.spool import ModelEntry, RunEntry
from medspark.train.config import FitConfig
from medspark.train.loop import fit
from medspark.train.world import World

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ALONE = World(0, 0, 1, torch.device("cpu"))
STORED = (255 * images(48)).numpy().astype(np.uint8).transpose(0, 2, 3, 1)
LABELS = (STORED[:, 8:24, 8:24].mean((1, 2, 3)) > STORED.mean()).astype(int)


class Quiet:
    def record(self, step: int, metrics: Any) -> None:
        """Keep nothing."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a network trained with a decision, and its result document."""
    place = tmp_path_factory.mktemp("trained")
    shards = write_arrays(place / "shards", dict.fromkeys(SPLITS, (STORED, LABELS)))
    config = FitConfig.model_validate(
        {
            "shards": shards,
            "run_dir": place / "run",
            "model": {"name": "test_resnet"},
            "train": {"epochs": 1, "batch_size": 16, "precision": "fp32", "mode": "standard"},
            "evaluate": {"attacks": ["pgd"], "steps": 2, "eps": [8 / 255], "sanity_images": 0},
            "attack": {"eps": 8 / 255},
            "decision": {"sensitivity": 0.6, "under": "pgd", "positive": "a"},
        }
    )
    result = fit(config, ALONE, Quiet())
    return place / "run" / "model", result


def base64_of(stored: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(stored[..., 0]).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_the_torch_network_mlflow_and_exports_answer_by_the_decision_of_the_training(
    trained, tmp_path: Path
) -> None:
    model, result = trained
    card = read_card(model)
    wanted = decided(Predictor.load(model)(STORED), card)
    likeliest = [card.classes[k] for k in Predictor.load(model)(STORED).argmax(1)]
    assert wanted != likeliest  # or nothing would be seen here
    assert set(wanted) == {"a", "b"}
    files = [base64_of(each) for each in STORED]

    answers = {
        "files": [each["label"] for each in FilePredictor.load(model)(files)],
        "mlflow": served(model, files, tmp_path),
        "export": exported(model, tmp_path, "fp32"),
    }

    assert answers == dict.fromkeys(answers, wanted)
    assert result["decision"] == card.decision.model_dump(mode="json")
    int8 = exported(model, tmp_path, "int8")
    assert np.mean(np.array(int8) == np.array(wanted)) > 0.9


def served(model: Path, files: list[str], tmp_path: Path) -> list[str]:
    """Return the labels of the registered model in MLflow."""
    import mlflow

    config = TrackConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}", system_metrics=False)
    entry = ModelEntry(
        folder=model,
        loader="medspark.models.predictor:Predictor.load",
        input_shape=(32, 32, 1),
        outputs=2,
        file_loader="medspark.models.file_predictor:FilePredictor.load",
        classes=("a", "b"),
        register_as="decided",
    )
    with tracked(tmp_path / "run", config, RunEntry(name="decided")) as run:
        run.end("FINISHED", model=entry)
    mlflow.set_tracking_uri(config.uri)
    mlflow.set_registry_uri(config.uri)
    asked = pd.DataFrame({"image": files})
    found = mlflow.pyfunc.load_model(run.reference["registered"]).predict(asked)
    return list(found["label"])


def exported(model: Path, tmp_path: Path, precision: Any) -> list[str]:
    """Return the labels of the exported graph; its card has the same threshold."""
    content = export_onnx(load_classifier(model), height=32, width=32)
    batch = STORED.transpose(0, 3, 1, 2).astype(np.float32) / 255
    graph = float_graph("onnxruntime", content)
    judge = Judge.of(batch, LABELS, graph.run)
    if precision == "int8":
        graph = int8_graph("onnxruntime", content, batch, [judge]).chosen
    folder, card = tmp_path / precision, read_card(model)
    made = write_artifact(
        folder, graph, card, backend="onnxruntime", precision=precision, twin="0" * 64, judge=judge
    )
    assert (made.decision, made.temperature) == (card.decision, card.temperature)
    paths = [tmp_path / f"{row}.png" for row in range(len(STORED))]
    for path, stored in zip(paths, STORED, strict=True):
        Image.fromarray(stored[..., 0]).save(path)
    return [each["label"] for each in predictions(DeployedModel.load(folder), paths)]


def test_the_figures_of_a_training_are_those_of_its_decision(trained) -> None:
    model, result = trained
    card = read_card(model)
    called = np.array(decided(Predictor.load(model)(STORED), card)) == "a"

    clean = result["clean"]
    assert clean["sensitivity"] == pytest.approx(called[LABELS == 0].mean())
    assert clean["specificity"] == pytest.approx((~called[LABELS == 1]).mean())
    low, high = clean["intervals"]["sensitivity"]
    assert low <= clean["sensitivity"] <= high


def test_the_threshold_under_attack_finds_enough_of_the_attacked_images(trained) -> None:
    """Test and validation images are the same here, and so is the attack on them."""
    model, result = trained
    found = read_card(model).decision.sensitivity
    (attacked,) = result["attacks"]

    assert found.right / found.images >= 0.6
    assert attacked["sensitivity"] == pytest.approx(found.right / found.images, abs=0.1)
    assert result["clean"]["sensitivity"] >= attacked["sensitivity"]
