"""A run taken over by a later attempt commits nothing, at any moment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medspark.errors import RunError
from medspark.train.state import Checkpoints

WEIGHTS = {"weights": torch.zeros(3)}


def claimed(folder: Path, attempt: int) -> Checkpoints:
    kept = Checkpoints(folder, attempt=attempt, keep=5)
    kept.claim()
    return kept


def test_a_run_that_is_superseded_while_it_writes_commits_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused = claimed(tmp_path, 1)
    assert paused.save(1, WEIGHTS, {})
    write = Checkpoints._write

    def write_slowly(self: Checkpoints, *arguments: object) -> None:
        write(self, *arguments)
        claimed(tmp_path, 2)

    monkeypatch.setattr(Checkpoints, "_write", write_slowly)

    with pytest.raises(RunError, match="Attempt 2"):
        paused.save(2, WEIGHTS, {})
    saved = paused.latest()
    assert saved is not None
    assert saved.record["step"] == 1
    assert [path.name[:14] for path in tmp_path.glob("step-*")] == ["step-000000001"]


def test_the_attempt_that_holds_a_run_may_claim_it_and_save_again(tmp_path: Path) -> None:
    claimed(tmp_path, 2)

    assert claimed(tmp_path, 2).save(1, WEIGHTS, {})


@pytest.mark.parametrize("steps", [(9, 10), (99_999, 100_000)])
def test_the_newest_checkpoint_has_the_larger_number_and_not_the_later_letter(
    steps: tuple[int, int], tmp_path: Path
) -> None:
    kept = claimed(tmp_path, 0)
    for step in steps:
        kept.save(step, WEIGHTS, {})

    saved = kept.latest()
    assert saved is not None
    assert saved.record["step"] == max(steps)
