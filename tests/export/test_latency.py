"""Latency and memory of an exported model, measured in a process of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_runtime import export

from medspark.errors import RunError
from medspark.export.latency import measure


def test_a_measurement_is_of_the_model_and_not_of_the_process_that_asks(model, tmp_path) -> None:
    ours = np.ones(1 << 27)  # a gibibyte, which the other process does not have

    found = measure(export(tmp_path / "exported", model), threads=1, images=5)

    assert found.threads == 1
    assert 0 < found.median <= found.p99
    assert 1 << 24 < found.peak_bytes < ours.nbytes


def test_a_model_that_cannot_be_opened_fails_the_measurement(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="could not be measured"):
        measure(tmp_path, threads=1, images=1)
