"""What had been made from the images of removed patients is named: shards, runs and models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_shards import write_arrays

from medspark.errors import UsageError
from medspark.ingest.forget import Patients
from medspark.jobs.forget import summary
from medspark.shards.manifest import read_manifest
from medspark.track import learnt
from medspark.track.learnt import Learnt
from medspark.workflows import forget as work
from medspark.workflows.forget import ForgetResult, ForgetWorkConfig, forget_patients

REMOVED = {"patients": 1, "unknown_lines": [2], "samples": 2, "duplicates": 0, "quarantined": 0,
           "files": 2}  # fmt: skip


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    images = np.zeros((4, 8, 8, 1), dtype=np.uint8)
    return write_arrays(tmp_path / "shards", {"train": (images, np.array([0, 1, 0, 1]))})


def named(
    monkeypatch: pytest.MonkeyPatch, keys: list[str], runs: Any, *shards: Path
) -> ForgetResult:
    """Return the result of a removal, which itself is left out."""
    monkeypatch.setattr(work, "forget", lambda *_, **__: REMOVED)
    monkeypatch.setattr(learnt, "runs_with_data", lambda _: runs)
    config = ForgetWorkConfig(samples="unused", patients=Path("unused"), shards=shards)
    nothing: Any = None
    return forget_patients(nothing, config, nothing, Patients(dict.fromkeys(keys, (1,))))


def keys_of(shards: Path) -> list[str]:
    from medspark.shards.schema import read_patients

    file = read_manifest(shards).splits["train"].shards[0].path
    return list(read_patients(shards / file)[:2])


def test_shards_and_runs_that_hold_a_patient_are_named(shards: Path, monkeypatch: Any) -> None:
    digest = read_manifest(shards).digest
    runs = [
        Learnt("r1", "first", digest, str(shards), ("chest version 1",)),
        Learnt("r2", "lost", "ff" * 32, "/gone", ()),
    ]

    found = named(monkeypatch, keys_of(shards), runs)

    assert [(each.folder, each.images) for each in found.shards] == [(str(shards), 2)]
    assert [(run.run_id, run.certain) for run in found.runs] == [("r1", True), ("r2", False)]
    assert "run first r1, model chest version 1\n" in summary(found)
    assert "no patient of these samples is named in line 2" in summary(found)


def test_shards_and_runs_without_a_patient_are_not_named(shards: Path, monkeypatch: Any) -> None:
    runs = [Learnt("r1", "first", read_manifest(shards).digest, str(shards), ())]

    found = named(monkeypatch, ["somebody else"], runs, shards)

    assert (found.shards, found.runs) == ((), ())


def test_a_shard_folder_that_is_not_there_is_refused_if_a_user_named_it(
    tmp_path: Path, monkeypatch: Any
) -> None:
    with pytest.raises(UsageError, match="There is no shard folder"):
        named(monkeypatch, ["a"], [], tmp_path / "none")
