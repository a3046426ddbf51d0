"""Exit statuses and results: the part of every job that scripts rely on."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest

from medspark.errors import RunError, UsageError
from medspark.job import JobConfig, run_job


class AJob(JobConfig):
    """A job."""

    number: int = 1


def test_a_finished_job_writes_its_result_and_prints_its_path_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    target = tmp_path / "deep" / "result.json"

    status = run_job(AJob, lambda c: {"twice": 2 * c.number}, ["--output", str(target)])

    assert status == 0
    result = json.loads(target.read_text())
    assert result.pop("versions")["python"]["version"] == platform.python_version()
    assert result == {"job": "test_job", "twice": 2}
    assert capsys.readouterr().out.splitlines()[-1] == str(target)


@pytest.mark.parametrize(
    ("error", "status"), [(UsageError("Mend it."), 2), (RunError("It broke."), 1), (OSError(), 1)]
)
def test_the_exit_status_tells_misuse_from_failure(error: Exception, status: int, tmp_path: Path):
    def work(_: AJob) -> dict[str, Any]:
        raise error

    target = tmp_path / "result.json"

    assert run_job(AJob, work, ["--output", str(target)]) == status
    assert not target.exists()


def test_misuse_is_told_in_one_line_without_a_traceback(capsys: pytest.CaptureFixture[str]):
    assert run_job(AJob, lambda _: {}, ["--nubmer", "3"]) == 2

    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "did you mean number?" in told[0]
