"""medspark-edge: the modules that prediction imports, and nothing else, in one small wheel."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from pydicom.data import get_testdata_file
from test_runtime import export

ROOT = Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("edge", ROOT / "conf" / "edge.py")
assert _SPEC is not None
assert _SPEC.loader is not None
edge = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(edge)

MODULES = edge.modules(*edge.ENTRIES)


def test_the_modules_are_those_that_prediction_loads() -> None:
    asked = (
        "import sys, medspark.export.predict, medspark.export.latency\n"
        "import medspark.images.fork_server\n"
        "print(*(name for name in sys.modules if name.split('.')[0] == 'medspark'))"
    )
    told = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)

    assert set(told.stdout.split()) == MODULES


def test_it_is_small_and_knows_nothing_of_training() -> None:
    assert "medspark.export.predict" in MODULES
    assert len(MODULES) < 45
    rooms = {name.split(".")[1] for name in MODULES if name.count(".") > 1}
    assert rooms == {"export", "images", "models"}


def test_the_versions_it_admits_are_those_of_medspark_itself() -> None:
    ours, theirs = (ROOT / "pyproject.toml").read_text(), edge.project()

    for name in (*edge.NEEDED, *edge.BACKENDS):
        (line,) = (each for each in ours.splitlines() if f'"{name}>' in each)
        wanted = next(part for part in line.split('"') if part.startswith(f"{name}>"))
        assert wanted in theirs


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_it_predicts_in_an_environment_that_has_nothing_else(backend, model, tmp_path) -> None:
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    folder = export(tmp_path / "exported", model, backend=backend)
    assert edge.main([str(tmp_path / "dist")]) == 0
    (wheel,) = (tmp_path / "dist").glob("medspark_edge-*.whl")
    assert len(zipfile.ZipFile(wheel).namelist()) < 50
    venv.create(tmp_path / "device", with_pip=True)
    python = tmp_path / "device" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", f"{wheel}[{backend}]"]
    installed = subprocess.run(install, capture_output=True, text=True, cwd=tmp_path)
    if "No matching distribution" in installed.stderr or "Could not" in installed.stderr:
        pytest.skip(f"no package index: {installed.stderr.strip().splitlines()[-1]}")

    files = [get_testdata_file(name) for name in ("CT_small.dcm", "JPEG2000.dcm")]
    told = subprocess.run(
        [python, "-m", "medspark.export.predict", folder, *files],
        capture_output=True, text=True, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip

    assert told.returncode == 0, told.stderr
    assert [set(each) for each in json.loads(told.stdout)] == [
        {"file", "label", "probability", "a", "b"}
    ] * 2
