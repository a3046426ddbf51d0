"""The layers of the house: upper modules import lower ones; torch and Spark code stay apart."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.py"))
_DEFINITIONS = (ast.FunctionDef, ast.ClassDef, ast.Assign)
COMMANDS = sorted((ROOT / "medspark" / "jobs").glob("[!_]*.py"))


def test_every_import_contract_of_pyproject_is_kept():
    kept = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert kept.returncode == 0, kept.stdout + kept.stderr


@pytest.mark.parametrize(("package", "stranger"), [("train", "pyspark"), ("ingest", "torch")])
def test_spark_and_torch_do_not_load_each_other(package: str, stranger: str):
    probe = (
        f"import importlib, pkgutil, sys, medspark.{package} as p\n"
        "for m in pkgutil.iter_modules(p.__path__, p.__name__ + '.'):\n"
        "    m.name.endswith('__main__') or importlib.import_module(m.name)\n"
        f"sys.exit({stranger!r} in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("module", "late"),
    [
        ("medspark.train.loop", ["sklearn", "scipy", "pandas", "matplotlib", "mlflow"]),
        ("medspark.workflows.train_at", ["sklearn", "pydicom", "matplotlib"]),
    ],
)
def test_the_first_step_waits_for_no_library_of_the_end(module: str, late: list[str]):
    assert _loaded_by(f"import {module}", late) == ""


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_a_job_is_configured_before_what_takes_seconds_is_imported(job: Path):
    load = f"import runpy; runpy.run_path({str(job)!r}, run_name='job')"

    assert _loaded_by(load, ["torch", "timm", "mlflow", "sklearn", "matplotlib"]) == ""


def test_the_usual_networks_are_known_without_timm():
    check = "from medspark.models.config import *; check_model(ModelConfig(name='mobilenet_v2'))"

    assert _loaded_by(check, ["torch", "timm"]) == ""


def test_an_attack_on_a_federation_is_configured_without_torch():
    assert _loaded_by("from medspark.federate.adversary.config import *", ["torch"]) == ""


def _loaded_by(statement: str, modules: list[str]) -> str:
    """Return which of ``modules`` are loaded in a new process after ``statement``."""
    probe = f"import sys; {statement}; sys.exit(str(set({modules!r}) & set(sys.modules) or ''))"
    asked = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    return asked.stderr.strip()


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_a_job_defines_nothing_and_starts_the_command_of_its_name(job: Path):
    defined = [n for n in ast.walk(ast.parse(job.read_text())) if isinstance(n, _DEFINITIONS)]

    assert defined == []
    assert f"from medspark.jobs.{job.stem} import main" in job.read_text()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: path.stem)
def test_the_command_of_a_job_is_one_page_without_logic(command: Path):
    text = command.read_text()
    functions = [n.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]

    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 75
    assert "main" in functions
    assert len(functions) <= 4


def test_every_package_says_in_one_line_what_it_is_for():
    for path in sorted((ROOT / "medspark").rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, f"{path} has no docstring"
        assert len(docstring.splitlines()[0]) <= 100, path
