"""The notebooks run from end to end, show pictures, and define nothing."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from key_files import write_key
from pyspark.sql import SparkSession

from medspark.workflows.notebook import parameters

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
ids = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture
def small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Parameters under which the notebooks take seconds; the key tells who trains and who not."""
    write_key(folder / "key", "notebooks")
    chosen = {
        "folder": folder, "key_file": folder / "key", "count": 60, "image_size": 32,
        "processes": 1, "shares": "1.0",
        "clients": 3, "rounds": 2, "aggregate": "median",
        "epochs": 1, "plain_epochs": 48, "images": 16, "steps": 2,
        "tracking_uri": f"sqlite:///{folder / 'mlflow.db'}",
    }  # fmt: skip
    for name, value in chosen.items():
        monkeypatch.setenv(f"MEDSPARK_{name.upper()}", str(value))
    monkeypatch.chdir(folder)
    return folder


def test_there_are_the_five_notebooks() -> None:
    assert [path.name[:3] for path in NOTEBOOKS] == ["01_", "02_", "03_", "04_", "05_"]


@pytest.mark.slow
@pytest.mark.spark
@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")  # of notebooks, everybody's own
@ids
def test_a_notebook_runs_from_end_to_end_and_shows_pictures(
    notebook: Path, small: Path, spark: SparkSession, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(notebook))

    shown = sorted((small / "pictures").glob(f"{notebook.name[:2]}-*.png"))
    assert shown
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in shown)
    assert str(shown[0]) in capsys.readouterr().out


@ids
def test_a_notebook_imports_shows_and_explains_and_defines_nothing(notebook: Path) -> None:
    tree = ast.parse(notebook.read_text())

    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not [node for node in ast.walk(tree) if isinstance(node, defined)]


@ids
def test_a_notebook_is_in_databricks_source_format_and_begins_by_saying_what_it_is_for(
    notebook: Path,
) -> None:
    first, *cells = notebook.read_text().split("\n# COMMAND ----------\n")

    assert first.startswith("# Databricks notebook source\n# MAGIC %md\n# MAGIC # ")
    assert len(cells) >= 5
    for cell in cells:
        magic = [line.startswith("# MAGIC") for line in cell.strip().splitlines()]
        assert all(magic) or not any(magic), cell
    explained = sum("# MAGIC %md" in cell for cell in cells)
    assert explained >= len(cells) / 3


def test_parameters_come_from_widgets_where_there_are_some() -> None:
    texts: dict[str, str] = {}
    widgets = SimpleNamespace(
        text=texts.setdefault, get=lambda name: "typed" if name == "eps" else texts[name]
    )

    found = parameters(SimpleNamespace(widgets=widgets), eps="4/255", folder="here")

    assert found == {"eps": "typed", "folder": "here"}


def test_parameters_come_from_the_environment_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSPARK_EPS", "2/255")

    assert parameters(None, eps="4/255", folder="here") == {"eps": "2/255", "folder": "here"}
