"""The progress of a Spark job, as a log keeps it."""

import time

import pytest

from medspark.spark.progress import followed


def test_a_log_has_the_bar_once_a_minute_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    parts = iter(range(100))
    with followed(lambda: next(parts), total=99, unit="file", doing="reading"):
        time.sleep(3.5)  # the bar looks three times
    written = capsys.readouterr().err.replace("\r", "\n").split("\n")
    lines = [line for line in written if "reading" in line]
    assert len(lines) == 2  # at the beginning, at the end
    assert int(lines[-1].split("/99")[0].rsplit(" ", 1)[-1]) >= 2
