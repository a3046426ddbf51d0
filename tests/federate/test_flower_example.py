"""The example for Flower, which is not installed here, keeps to names that medspark has."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from medspark.federate.local import LocalConfig

EXAMPLE = Path(__file__).parents[2] / "notebooks" / "flower"


def imports(file: str) -> list[tuple[str, str]]:
    """Return what a file imports from medspark: modules and names."""
    tree = ast.parse((EXAMPLE / file).read_text("utf-8"))
    return [
        (str(node.module), alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("medspark")
        for alias in node.names
    ]


@pytest.mark.parametrize("file", ["hospital.py", "server.py"])
def test_all_that_the_example_imports_exists(file: str):
    found = imports(file)

    assert found
    assert all(hasattr(importlib.import_module(module), name) for module, name in found)


def test_a_hospital_needs_neither_spark_nor_mlflow():
    modules = sorted({module for module, _ in imports("hospital.py")})
    code = f"import {', '.join(modules)}, sys; print(*sys.modules)"

    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()

    assert not {"pyspark", "mlflow"} & set(loaded)


def test_the_examples_settings_are_a_clients_configuration():
    document = tomllib.loads((EXAMPLE / "pyproject.toml").read_text("utf-8"))
    local = document["tool"]["flwr"]["app"]["config"]["local"]

    config = LocalConfig.model_validate_json(local)

    assert config.model_dump(include=set(json.loads(local)) - {"train"}).items() <= (
        json.loads(local).items()
    )
