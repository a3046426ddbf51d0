"""A guarded model, served as MLflow serves it, says of every file how suspicious it is."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from guarded_networks import build_guarded
from PIL import Image

from medspark.defend.detect.contrastive import Contrastive
from medspark.defend.detect.detector import Detector
from medspark.defend.detect.extract import Extractor
from medspark.defend.detect.features import EMBEDDING, LOGITS
from medspark.defend.detect.guard import Guard, guard_of, save_guard
from medspark.defend.detect.kde import KernelDensity
from medspark.defend.detect.served import GuardedPredictor
from medspark.files import sha256_of
from medspark.models.backbones import build
from medspark.models.checkpoint import describe, save_classifier
from medspark.models.classifier import Classifier
from medspark.models.config import ModelConfig
from medspark.track.config import TrackConfig
from medspark.track.runs import tracked
from medspark.track.spool import ModelEntry, RunEntry

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CLASSES, SIDE = ("normal", "suspicious"), 32
CARD = {"classes": CLASSES, "height": SIDE, "width": SIDE}
NOISE = np.random.default_rng(0).integers(0, 256, (20, SIDE, SIDE, 1), dtype=np.uint8)
PLAIN = np.full((1, SIDE, SIDE, 1), 40, dtype=np.uint8)


def _plain(images: torch.Tensor) -> tuple[Classifier, Detector]:
    """A network with a density of its logits, as jobs/detect.py makes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12)  # weights for which the plain image lies far from the noise
        network = build(ModelConfig(name="test_resnet"), num_classes=2, channels=1).eval()
    with torch.no_grad():
        points = network(images)
    spread = float((points - points.mean(0)).norm(dim=1).max())
    return network, KernelDensity(LOGITS, points, points.argmax(1), spread)


def _denoised(_: torch.Tensor) -> tuple[Classifier, Detector]:
    """A network behind a denoiser with its contrastive detector, as jobs/denoise.py makes."""
    network = build_guarded(side=SIDE)
    with torch.no_grad():
        for name, parameter in network.contrast.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()  # so that embeddings of untrained layers differ
        odd = torch.from_numpy(PLAIN).permute(0, 3, 1, 2) / 255
        # The prototype lies opposite the plain image, so nothing is farther from it.
        return network, Contrastive.of(EMBEDDING, -network(odd, "whole").embedding)


@pytest.fixture(
    scope="module",
    params=[(_plain, "flag"), (_denoised, "refuse")],
    ids=["a guard that flags", "a denoised model that refuses"],
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose guard knows noise and finds the plain image suspicious."""
    make, action = request.param
    folder = tmp_path_factory.mktemp("model")
    noise, plain = (torch.from_numpy(x).permute(0, 3, 1, 2) / 255 for x in (NOISE, PLAIN))
    network, detector = make(noise)
    save_classifier(folder, network, describe(network, **CARD))
    look = Extractor.on(network, detector.layers, "")
    scores, odd = (detector.score(look(x)).double().numpy() for x in (noise, plain))
    assert odd.max() > scores.max()
    guard = Guard(detector, scores, 0.05, action)
    guard_of(folder).mkdir()
    network_digest = sha256_of(folder / "model.safetensors")
    save_guard(guard_of(folder), guard, features=look(plain), head="", network=network_digest)
    return folder


@pytest.fixture(scope="module")
def registered(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("registry")
    config = TrackConfig(
        uri=f"sqlite:///{folder / 'mlflow.db'}", system_metrics=False, patience_seconds=0
    )
    entry = ModelEntry(
        folder=model,
        loader="medspark.defend.detect.served:GuardedPredictor.load",
        input_shape=(SIDE, SIDE, 1),
        outputs=3,
        file_loader="medspark.defend.detect.served:guarded_files",
        classes=("normal", "class suspicious"),
        guarded=True,
        register_as="guarded",
    )
    with tracked(folder / "run", config, RunEntry(name="guarded")) as run:
        run.end("FINISHED", model=entry)
    return dict(run.reference)


@pytest.fixture(scope="module")
def server(registered: dict[str, Any], serve: Callable[..., str]) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ("models", "serve", "-m", registered["registered"], "--env-manager", "local")
    return serve(*command, page="ping", MLFLOW_TRACKING_URI=registered["uri"], PATH=path)


def test_every_answer_of_the_server_says_how_suspicious_the_file_is(
    server: str, model: Path
) -> None:
    known, odd, bad = _ask(server, _png(NOISE[3]), _png(PLAIN[0]), "no image!")

    assert set(known) == {"label", "probability", "normal", "class suspicious", *_DOUBT}
    assert known["suspicious"] is False
    assert known["p_value"] > 0.05
    assert odd["suspicious"] is True
    assert odd["p_value"] == pytest.approx(1 / 21)
    assert set(bad) == {"error"}
    withheld = json.loads((guard_of(model) / "guard.json").read_text())["action"] == "refuse"
    assert (set(odd) == _DOUBT) is withheld
    assert ("label" in odd) is not withheld


def test_arrays_get_probabilities_and_a_p_value_and_none_where_they_are_withheld(
    registered: dict[str, Any], model: Path
) -> None:
    images = np.concatenate([NOISE[:2], PLAIN]).astype(np.float32) / 255

    found = mlflow.pyfunc.load_model(registered["model"]).predict(images)

    assert found.shape == (3, 3)
    np.testing.assert_allclose(found, GuardedPredictor.load(model)(images), atol=1e-6)
    assert not np.isnan(found[:2]).any()
    refuses = json.loads((guard_of(model) / "guard.json").read_text())["action"] == "refuse"
    assert np.isnan(found[2, :2]).all() == refuses


_DOUBT = {"suspicious", "p_value"}


def _png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0]).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _ask(server: str, *files: str) -> list[dict[str, Any]]:
    body = json.dumps({"dataframe_records": [{"image": text} for text in files]}).encode()
    request = urllib.request.Request(
        f"{server}/invocations", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return list(json.load(answer)["predictions"])
