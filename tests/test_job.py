"""Exit statuses and results: the part of every job that scripts rely on."""

from __future__ import annotations

import errno
import json
import logging
import platform
from pathlib import Path
from typing import Any

import pytest

from medspark.errors import RunError, UsageError
from medspark.job import JobConfig, command_line, run_job


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
    ("started", "shown"),
    [
        (["jobs/paper_table.py"], "spark-submit jobs/paper_table.py"),
        (["/usr/bin/medspark", "paper_table"], "medspark paper_table"),
        (["/lib/medspark/__main__.py", "paper_table"], "medspark paper_table"),
    ],
)
def test_the_command_line_is_shown_as_it_was_given_without_its_secrets(
    started: list[str], shown: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.argv", [*started, "--seeds", "1,2", "--track.token", "abc"])

    assert command_line() == f"{shown} --seeds 1,2 --track.token '***'"


@pytest.mark.parametrize(
    ("error", "status"), [(UsageError("Mend it."), 2), (RunError("It broke."), 1), (OSError(), 1)]
)
def test_the_exit_status_tells_misuse_from_failure(error: Exception, status: int, tmp_path: Path):
    def work(_: AJob) -> dict[str, Any]:
        raise error

    target = tmp_path / "result.json"

    assert run_job(AJob, work, ["--output", str(target)]) == status
    assert not target.exists()


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("/proc/self/result.json", ""),
        ("{tmp}", "it is a folder"),
        ("{tmp}/file/result.json", "/file is a file"),
    ],
)
def test_a_result_that_cannot_be_written_is_told_before_any_work(tmp_path, capsys, output, why):
    (tmp_path / "file").touch()

    def work(_: AJob) -> dict[str, Any]:
        raise AssertionError("work was begun")

    status = run_job(AJob, work, ["--output", output.format(tmp=tmp_path)])

    assert status == 2
    said = capsys.readouterr().err
    assert said.startswith("test_job: The result cannot be written to ")
    assert why in said
    assert len(said.splitlines()) == 1


def test_to_try_whether_the_result_can_be_written_leaves_nothing(tmp_path: Path):
    (tmp_path / "result.json").write_text("the one before")

    assert run_job(AJob, lambda _: 1 / 0, ["--output", str(tmp_path / "result.json")]) == 1  # type: ignore[arg-type,return-value]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert (tmp_path / "result.json").read_text() == "the one before"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_and_status_1(tmp_path, capsys, code):
    def work(_: AJob) -> dict[str, Any]:
        raise OSError(code, "No space left on device", "/data/x")

    assert run_job(AJob, work, ["--output", str(tmp_path / "result.json")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("test_job failed: The disk is full (/data/x): make room, then ")
    assert len(said.splitlines()) == 1


def test_a_disk_that_is_full_at_the_end_leaves_no_half_result(tmp_path, monkeypatch, capsys):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)

    assert run_job(AJob, lambda _: {}, ["--output", str(tmp_path / "result.json")]) == 1
    assert "The disk is full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_misuse_is_told_in_one_line_without_a_traceback(capsys: pytest.CaptureFixture[str]):
    assert run_job(AJob, lambda _: {}, ["--nubmer", "3"]) == 2

    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "did you mean number?" in told[0]


def test_the_terminal_does_not_show_what_py4j_tries_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def work(_: AJob) -> dict[str, Any]:
        for level, text in ((logging.INFO, "sending failed"), (logging.WARNING, "gave up")):
            told = {"pathname": "/env/py4j/java_gateway.py", "levelno": level, "msg": text}
            logging.getLogger().handle(logging.makeLogRecord(told | {"name": "root"}))
        logging.getLogger("another").info("heard")
        return {}

    run_job(AJob, work, ["--output", str(tmp_path / "result.json")])

    shown = capsys.readouterr().err
    assert "gave up" in shown
    assert "heard" in shown
    assert "sending failed" not in shown
