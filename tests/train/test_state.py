"""A checkpoint is complete or ignored, and a superseded attempt cannot write one."""

from __future__ import annotations

import json
import resource
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medspark.errors import RunError
from medspark.train.state import RECORD, TENSORS, Checkpoints


def checkpoints(folder: Path, *, attempt: int = 0, keep: int = 5) -> Checkpoints:
    return Checkpoints(folder, attempt=attempt, keep=keep)


def fill(folder: Path, steps: list[int], **chosen: int) -> Checkpoints:
    kept = checkpoints(folder, **chosen)
    kept.claim()
    for step in steps:
        assert kept.save(step, {"weights": torch.full((3,), float(step))}, {"note": step})
    return kept


def latest_step(folder: Path) -> int | None:
    saved = checkpoints(folder).latest()
    if saved is None:
        return None
    assert torch.equal(saved.tensors["weights"], torch.full((3,), float(saved.record["step"])))
    assert saved.record["note"] == saved.record["step"]
    return int(saved.record["step"])


def test_the_newest_checkpoint_comes_back(tmp_path: Path):
    fill(tmp_path, [5, 10, 200])

    assert latest_step(tmp_path) == 200


def test_only_the_newest_are_kept(tmp_path: Path):
    fill(tmp_path, [1, 2, 3, 4], keep=2)

    assert sorted(path.name[:14] for path in tmp_path.glob("step-*")) == [
        "step-000000003",
        "step-000000004",
    ]


@given(
    keep=st.integers(1, 3),
    damaged=st.sets(st.integers(0, 30), max_size=8),
    steps=st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True).map(sorted),
    looked=st.booleans(),
)
def test_what_was_just_saved_is_there_whatever_lies_beside_it(
    keep: int, damaged: set[int], steps: list[int], looked: bool
):
    with tempfile.TemporaryDirectory() as place:
        for step in damaged:
            Path(place, f"step-{step:09d}-attempt-0001").mkdir()
        kept = checkpoints(Path(place), attempt=2, keep=keep)
        if looked:
            kept.latest()

        for step in steps:
            assert kept.save(step, {"weights": torch.full((3,), float(step))}, {"note": step})
            assert latest_step(Path(place)) == step

        if looked:  # the damaged ones are known, and count for nothing
            whole = [path.name for path in Path(place).glob("step-*attempt-0002")]
            assert len(whole) == min(keep, len(steps))


@pytest.mark.parametrize("name", [TENSORS, RECORD])
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_damaged_checkpoint_is_passed_over(name: str, damage: str, tmp_path: Path):
    fill(tmp_path, [1, 2])
    (newest,) = tmp_path.glob("step-000000002*")
    path = newest / name
    content = path.read_bytes()
    if damage == "delete":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        at = content.index(b"sha256") if name == RECORD else len(content) - 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])

    assert latest_step(tmp_path) == 1


def test_without_a_checkpoint_there_is_none(tmp_path: Path):
    assert latest_step(tmp_path / "nowhere") is None


def test_a_later_attempt_fences_off_an_earlier_one(tmp_path: Path):
    paused = fill(tmp_path, [1], attempt=1)
    fill(tmp_path, [2], attempt=2)

    with pytest.raises(RunError, match="Attempt 2"):
        paused.save(3, {"weights": torch.zeros(3)}, {})
    with pytest.raises(RunError, match="Attempt 2"):
        paused.claim()
    assert latest_step(tmp_path) == 2


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(tmp_path: Path):
    kept = fill(tmp_path / "run", [1])
    (tmp_path / "run" / ".step-000000002-attempt-0000").write_text("in the way")
    # A file in place of the scratch folder simulates a full or broken disk.

    written = kept.save(2, {"weights": torch.zeros(3)}, {})

    assert not written
    assert latest_step(tmp_path / "run") == 1


def test_a_disk_that_fills_up_below_the_tensors_does_not_end_the_run(tmp_path: Path):
    kept = fill(tmp_path, [1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # no file may grow beyond a MiB
    try:
        written = kept.save(2, {"weights": torch.zeros(1 << 20)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert not written
    assert latest_step(tmp_path) == 1
    assert not list(tmp_path.glob(".step-*"))


def test_clearing_removes_every_checkpoint(tmp_path: Path):
    kept = fill(tmp_path, [1, 2])

    kept.clear()

    assert latest_step(tmp_path) is None


def test_nothing_is_pickled(tmp_path: Path):
    fill(tmp_path, [1])
    (folder,) = tmp_path.glob("step-*")

    assert sorted(path.name for path in folder.iterdir()) == sorted([TENSORS, RECORD])
    assert json.loads((folder / RECORD).read_text())["step"] == 1
