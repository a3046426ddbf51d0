"""A registered model, served as MLflow serves it, answers image files with probabilities."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
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
def server(
    registered: dict[str, Any],
    serve: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ("models", "serve", "-m", registered["registered"], "--env-manager", "local")
    # A server has no Spark; and the test has not all day.
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "pyspark.py").write_text("raise ModuleNotFoundError('hidden', name='pyspark')")
    paths = os.pathsep.join([str(hidden), os.environ.get("PYTHONPATH", "")])
    return serve(
        *command, page="ping", MLFLOW_TRACKING_URI=registered["uri"], PATH=path,
        PYTHONPATH=paths, MEDSPARK_SERVE_FILE_SECONDS="6",
    )  # fmt: skip


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


def test_a_file_that_cannot_be_read_is_an_error_beside_the_answers_of_the_others(
    server: str, model: Path
) -> None:
    good = _text(Path(str(get_testdata_file("CT_small.dcm"))).read_bytes())

    first, bad, last = _ask(server, good, "no image!", good)

    assert bad == {"error": "The image is not base64."}
    assert first == last == pytest.approx(FilePredictor.load(model)([good])[0], abs=1e-6)


def test_files_made_to_take_for_ever_hold_up_nobody_and_fill_no_memory(server: str) -> None:
    """Eight requests of 470 kB, each good for minutes, and a good one behind them."""
    good = _text(Path(str(get_testdata_file("JPEG2000.dcm"))).read_bytes())
    _ask(server, good)
    bombs: list[list[dict[str, Any]]] = []
    bomb = _text(_bomb())
    asking = [threading.Thread(target=lambda: bombs.append(_ask(server, bomb))) for _ in range(8)]
    with _Memory(server) as memory:
        for thread in asking:
            thread.start()
        time.sleep(0.5)
        began = time.monotonic()
        (answer,) = _ask(server, good)
        waited = time.monotonic() - began
        for thread in asking:
            thread.join()

    print(f"a good file took {waited:.1f} s, memory grew by {memory.growth / 1e6:.0f} MB")
    assert answer["label"] in CLASSES
    assert waited < 20  # 5 on a machine with nothing else to do
    assert memory.growth < 1.5e9
    assert {tuple(row) for rows in bombs for row in rows} == {("error",)}
    assert len(bombs) == 8
    assert _ask(server, good) == [answer]


def test_no_answer_shows_a_trace_or_a_path_of_the_server(server: str, model: Path) -> None:
    damaged = bytearray(Path(str(get_testdata_file("JPEG2000.dcm"))).read_bytes())
    damaged[-2000:] = bytes(2000)

    text = json.dumps(_ask(server, _text(bytes(damaged)), "", "!", _text(b"BM" + bytes(50))))

    assert not any(word in text for word in ("Traceback", 'File "', "site-packages", str(model)))
    assert text.count('"error"') == 4


def _bomb(side: int = 5600, size: int = 470_000) -> bytes:
    """A progressive JPEG whose last scan, 51 bytes that go over the whole image, comes again."""
    file = io.BytesIO()
    Image.new("L", (side, side), 128).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + scan * ((size - len(whole)) // len(scan)) + whole[-2:]


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _status(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return process.status()
    return "zombie"


class _Memory(threading.Thread):
    """The most that the server of this test run and its decoders hold more than at first."""

    def __init__(self, server: str) -> None:
        super().__init__(daemon=True)
        port = server.rsplit(":", 1)[1]
        alive = (child for child in psutil.Process().children() if _status(child) != "zombie")
        (self._server,) = [process for process in alive if port in process.cmdline()]
        self._end, self._first, self.growth = threading.Event(), self._held(), 0

    def _held(self) -> int:
        held = 0
        for process in [self._server, *self._server.children(recursive=True)]:
            with suppress(psutil.Error):
                held += process.memory_full_info().uss
        return held

    def run(self) -> None:
        while not self._end.wait(0.1):
            self.growth = max(self.growth, self._held() - self._first)

    def __enter__(self) -> _Memory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()
