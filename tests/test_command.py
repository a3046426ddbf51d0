"""The command medspark: every job of jobs/, for users who have no clone."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from medspark.__main__ import descriptions, main

ROOT = Path(__file__).parents[1]


def _output(*words: str | Path) -> str:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def test_it_knows_the_jobs_of_the_clone_and_no_others():
    assert set(descriptions()) == {path.stem for path in (ROOT / "jobs").glob("*.py")}


def test_help_lists_each_job_with_its_line(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0

    text = capsys.readouterr().out
    for name, line in descriptions().items():
        assert any(row.split() == [name, *line.split()] for row in text.splitlines()), name


def test_help_imports_no_job_and_no_library_of_theirs():
    probe = (
        "import sys\nfrom medspark.__main__ import main\nmain(['--help'])\n"
        "print('LOADED', [m for m in ('torch', 'pyspark', 'mlflow') if m in sys.modules])"
    )

    assert _output("-c", probe).splitlines()[-1] == "LOADED []"


def test_a_job_is_the_one_that_spark_submit_runs():
    by_page = _output(ROOT / "jobs" / "shard.py", "--help")

    assert _output("-m", "medspark", "shard", "--help") == by_page
    assert "--samples" in by_page


def test_an_unknown_job_ends_with_2_and_the_nearest_name(capsys: pytest.CaptureFixture[str]):
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "medspark: There is no job 'train'; did you mean train_at?\n"


def test_the_wheel_installs_the_command():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["medspark"].partition(":")

    assert getattr(import_module(module), function) is main
