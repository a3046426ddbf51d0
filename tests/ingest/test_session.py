"""The session's edges: what is shipped, how masters are spelt, what a failed task says."""

from __future__ import annotations

import subprocess
import sys
import zipfile

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


def test_the_shipped_package_imports_where_nothing_is_installed(tmp_path):
    archive = package_zip(tmp_path)

    code = (
        f"import sys; sys.path = [{str(archive)!r}, *sys.path]; "
        "import medspark.errors; print(medspark.errors.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )

    assert done.stdout.startswith(str(archive))


def test_the_same_code_is_shipped_as_the_same_bytes(tmp_path):
    (tmp_path / "again").mkdir()

    first, second = package_zip(tmp_path), package_zip(tmp_path / "again")

    assert first.read_bytes() == second.read_bytes()
    names = zipfile.ZipFile(first).namelist()
    assert "medspark/images/decode.py" in names
    assert all(name.startswith("medspark/") and name.endswith(".py") for name in names)


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
