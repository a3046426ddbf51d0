"""The session's edges: what is shipped, how masters are spelt, what a failed task says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from medspark.errors import RunError
from medspark.ingest.session import _cause, _retrying, task_errors
from medspark.ingest.ship import package_zip

FAILED = """
  An exception was thrown from the Python worker. Please see the stack trace below.
Traceback (most recent call last):
  File "/x/shards.py", line 1, in _check
    raise RunError("The part p has been damaged.")
medspark.errors.RunError: The part p has been damaged.

Driver stacktrace:
Caused by: org.apache.spark.SparkException: Job aborted
"""


def imported(archive: Path) -> str:
    """Return the file that medspark.errors comes from where only ``archive`` is there first."""
    archive.write_bytes(package_zip())
    code = (
        f"import sys; sys.path = [{str(archive)!r}, *sys.path]; "
        "import medspark.errors; print(medspark.errors.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    return done.stdout.strip()


def test_the_shipped_package_imports_from_its_byte_code_where_nothing_is_installed(tmp_path):
    archive = tmp_path / "medspark.zip"

    assert imported(archive) == f"{archive}/medspark/errors.pyc"


def test_a_worker_with_another_python_reads_the_shipped_source(tmp_path, monkeypatch):
    archive = tmp_path / "medspark.zip"
    package_zip.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "MAGIC_NUMBER", b"\0\0\r\n")
        found = imported(archive)
    package_zip.cache_clear()

    assert found == f"{archive}/medspark/errors.py"


def test_what_was_shipped_is_removed_when_the_driver_ends():
    code = "from medspark.ingest.ship import package_file; print(package_file(), package_file())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    first, second = done.stdout.split()
    assert first == second
    assert not Path(first).parent.exists()


@pytest.mark.parametrize(
    ("master", "retrying"),
    [
        ("local", "local[1,4]"),
        ("local[*]", "local[*,4]"),
        ("local[3]", "local[3,4]"),
        ("local[3,1]", "local[3,1]"),
        ("spark://host:7077", "spark://host:7077"),
    ],
)
def test_a_local_task_that_dies_is_tried_again_as_on_a_cluster(master, retrying):
    assert _retrying(master) == retrying


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (FAILED, "The part p has been damaged."),
        (FAILED.replace("medspark.errors.RunError", "OSError"), "OSError: The part p"),
        ("java.io.IOException: No space left on device\n\tat x", "No space left on device"),
    ],
)
def test_what_went_wrong_in_a_task_is_said_in_one_line(text, said):
    assert said in _cause(text)


def test_an_error_of_spark_becomes_ours():
    from pyspark.errors import PySparkRuntimeError

    with pytest.raises(RunError, match="A Spark task failed"), task_errors():
        raise PySparkRuntimeError("boom")
