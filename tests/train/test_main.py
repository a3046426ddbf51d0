"""python -m medspark.train: training without Spark follows the same rules for folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from medspark.train import __main__ as alone


@pytest.fixture(autouse=True)
def never_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    def join() -> None:
        raise AssertionError("the ranks were joined")

    monkeypatch.setattr(alone, "join", join)
    monkeypatch.delenv("RANK", raising=False)


@pytest.mark.parametrize(
    ("held", "words", "said"),
    [
        ("notes.txt", [], "not medspark's"),
        ("model/model.safetensors", ["--resume", "never", "--overwrite"], "not medspark's"),
        ("run.json", [], "not medspark's"),
    ],
)
def test_a_strangers_folder_is_refused_before_the_ranks_meet(tmp_path, capsys, held, words, said):
    run = tmp_path / "run"
    (run / held).parent.mkdir(parents=True)
    (run / held).write_text("theirs")

    status = alone.main(["--shards", str(tmp_path / "shards"), "--run_dir", str(run), *words])

    assert status == 2
    assert said in capsys.readouterr().err
    assert [path for path in run.rglob("*") if path.is_file()] == [run / held]


def test_shards_inside_the_run_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        alone.main(["--shards", str(tmp_path / "run/a"), "--run_dir", str(tmp_path / "run")]) == 2
    )
    assert "should not lie inside the folder of the run" in capsys.readouterr().err


def test_a_rank_that_does_not_write_holds_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")

    with pytest.raises(AssertionError, match="the ranks were joined"):
        alone.main(["--shards", str(tmp_path / "shards"), "--run_dir", str(tmp_path / "run")])

    assert not (tmp_path / "run").exists()
