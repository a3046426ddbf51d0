"""Prediction on a device: probabilities of files as JSON, a bad file as one sentence, no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from networks import images
from PIL import Image
from pydicom.data import get_testdata_file
from test_runtime import export

from medspark.export.onnx import TOLERANCE
from medspark.export.predict import main
from medspark.models.checkpoint import load_classifier
from medspark.models.predictor import Predictor

ABSENT = (
    "torch", "timm", "pyspark", "mlflow", "pyarrow", "pandas", "sklearn", "scipy", "yaml",
    "pydantic_settings", "cryptography", "matplotlib", "safetensors",
)  # fmt: skip


@pytest.fixture
def exported(tmp_path: Path, model: Path) -> Path:
    return export(tmp_path / "exported", model)


def test_files_are_answered_as_by_the_torch_network(exported, model, tmp_path, capsys) -> None:
    stored = (255 * images(1)).numpy().astype(np.uint8)[0, 0]
    Image.fromarray(stored).save(tmp_path / "x.png")

    assert (
        main([str(exported), str(tmp_path / "x.png"), str(get_testdata_file("CT_small.dcm"))]) == 0
    )

    first, second = json.loads(capsys.readouterr().out)
    card = Predictor.load(model).card.model_copy(update={"temperature": 1.5})
    (wanted,) = Predictor(load_classifier(model), card)(stored[None, ..., None])
    assert np.abs(np.array([first["a"], first["b"]]) - wanted).max() <= TOLERANCE
    assert first["file"] == str(tmp_path / "x.png")
    assert second["a"] + second["b"] == pytest.approx(1, abs=1e-5)


def test_a_bad_file_is_one_sentence_beside_the_answers_of_the_others(exported, tmp_path, capsys):
    (tmp_path / "bad.dcm").write_bytes(b"no image")

    files = [tmp_path / "bad.dcm", get_testdata_file("CT_small.dcm"), tmp_path / "none.dcm"]
    assert main([str(exported), *map(str, files)]) == 1

    bad, good, none = json.loads(capsys.readouterr().out)
    assert bad["error"] == (
        "The image cannot be read: the content is neither DICOM nor PNG, JPEG, TIFF or BMP."
    )
    assert none["error"].startswith("The image cannot be read: ")
    assert "label" in good


def test_a_folder_that_is_no_export_is_one_sentence(model: Path, tmp_path: Path, capsys) -> None:
    assert main([str(model), str(tmp_path / "x.png")]) == 2

    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("predict: ")


@pytest.mark.parametrize("command", ["predict", "latency"])
def test_nothing_is_loaded_that_a_device_does_not_have(command: str, exported: Path) -> None:
    file = [get_testdata_file("JPEG2000.dcm")] if command == "predict" else ["--images=3"]
    program = (
        f"import sys; from medspark.export.{command} import main\n"
        f"status = main({[str(exported), *map(str, file)]!r})\n"
        f"sys.exit(str(set({ABSENT!r}) & set(sys.modules)) if status == 0 else 'failed')"
    )

    asked = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert asked.stderr.strip() == "set()"
