"""The folder of a training: starting another run never loses results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.errors import UsageError
from medspark.models.config import ModelConfig
from medspark.ownership import MARKER, claim
from medspark.train.config import DistillConfig
from medspark.train.run_folder import check_run_folder, held_run, keep_result, kept_result

NAMES = (
    "run.json", "finished.json", "result.json", "model/model.json", "model/model.safetensors",
    "report/MODEL_CARD.md", "report/result.json", "journal/00000000-0123abcd.jsonl",
    "attempts/0001/rank-0.log", "attempts/0001/rank-1.started.json", "attempts/0001/nonce",
    "attempts/0001/torchrun-0.log",
    "checkpoints/attempt", "checkpoints/step-000000005-attempt-0001/state.json",
    "checkpoints/.step-000000005-attempt-0001/state.safetensors", "plain/model/model.json",
    "plain/run.json", "plain/checkpoints/step-000000005-attempt-0001/state.json",
)  # fmt: skip


def write(folder: Path, name: str, document: dict[str, Any] | None = None) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(document or {}))


def record(status: str | None, source: str = "") -> dict[str, Any]:
    ending = {"status": status} if status else None
    return {"entry": {"dataset": {"source": source}}, "ending": ending}


FINISHED = [
    {"finished.json": {}},
    {"run.json": record("FINISHED")},
    {"result.json": {"model": "m"}},
    {"run.json": record("FAILED"), "finished.json": {}},
]
UNFINISHED = [
    {"run.json": record(None)},
    {"run.json": record("KILLED")},
    {"model/model.json": {}},
    {"run.json": record("FAILED"), "checkpoints/step-000000005-attempt-0001/state.json": {}},
    {"plain/run.json": record("FINISHED"), "run.json": record("FAILED")},
    {"plain/run.json": record(None)},
]
NOTHING = [{}, {"run.json": record("FAILED")}, {"journal/00000000-0123abcd.jsonl": {}}]


def a_run(folder: Path, left: dict[str, Any]) -> dict[Path, str]:
    claim(folder, "run")
    for name, document in left.items():
        write(folder, name, document)
    return contents(folder)


def contents(folder: Path) -> dict[Path, str]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.read_text() for path in found}


@pytest.mark.parametrize(
    ("left", "said"),
    [(left, "a finished run: --overwrite replaces it, --resume auto returns") for left in FINISHED]
    + [
        (left, "an unfinished run: --resume auto continues it, and --overwrite")
        for left in UNFINISHED
    ],
)
def test_a_run_that_would_be_lost_is_refused_with_the_ways_out(tmp_path, left, said):
    before = a_run(tmp_path, left)

    with pytest.raises(UsageError, match=said), held_run(tmp_path, fixed=True, resume="never"):
        pass

    assert contents(tmp_path) == before


@pytest.mark.parametrize("left", FINISHED + UNFINISHED + NOTHING)
def test_a_run_that_goes_on_finds_all_that_it_left(tmp_path, left):
    before = a_run(tmp_path, left)

    with held_run(tmp_path, fixed=True, resume="auto") as folder:
        assert contents(folder) == before


@pytest.mark.parametrize("left", FINISHED + UNFINISHED)
def test_overwrite_begins_again(tmp_path, left):
    a_run(tmp_path, left)

    with held_run(tmp_path, fixed=True, resume="never", overwrite=True) as folder:
        assert {path.name for path in contents(folder)} == {MARKER}


@pytest.mark.parametrize("left", NOTHING)
def test_a_run_that_failed_before_it_had_anything_is_no_obstacle(tmp_path, left):
    a_run(tmp_path, left)

    with held_run(tmp_path, fixed=True, resume="never") as folder:
        assert {path.name for path in contents(folder)} == {MARKER}


def test_the_rounds_of_a_federation_that_failed_are_not_lost(tmp_path):
    a_run(tmp_path, {"run.json": record("FAILED"), "round-00000/result.json": {}})

    with (
        pytest.raises(UsageError, match="an unfinished run"),
        held_run(tmp_path, fixed=True, resume="never"),
    ):
        pass


def test_by_default_each_finished_run_keeps_its_folder_and_the_next_gets_another(tmp_path):
    seen = []
    for _ in range(12):
        with held_run(tmp_path / "x.run", fixed=False, resume="never") as folder:
            write(folder, "finished.json")
            seen.append(folder.name)

    assert seen == ["x.run", *(f"x-{number}.run" for number in range(2, 13))]


def test_by_default_the_newest_run_is_the_one_that_is_meant(tmp_path):
    a_run(tmp_path / "x.run", FINISHED[0])
    a_run(tmp_path / "x-2.run", UNFINISHED[0])

    with held_run(tmp_path / "x.run", fixed=False, resume="auto") as folder:
        assert folder.name == "x-2.run"
    with (
        pytest.raises(UsageError, match=r"x-2\.run holds an unfinished run"),
        held_run(tmp_path / "x.run", fixed=False, resume="never"),
    ):
        pass


@pytest.mark.parametrize("left", [record("FINISHED"), record(None), record("KILLED")])
@pytest.mark.parametrize("place", ["run.json", "plain/run.json"])
def test_the_demo_renews_its_own_run(tmp_path, left, place):
    on_demo = left | {"entry": {"dataset": {"source": str(tmp_path / "demo" / "shards")}}}
    a_run(tmp_path / "x.run", {place: on_demo})

    with held_run(
        tmp_path / "x.run", fixed=False, resume="never", demo=tmp_path / "demo"
    ) as folder:
        assert folder.name == "x.run"
        assert not (folder / place).exists()


@pytest.mark.parametrize(("fixed", "source"), [(True, "demo/shards"), (False, "mine/shards")])
def test_the_demo_renews_no_other_run(tmp_path, fixed, source):
    left = {"run.json": record("FINISHED", str(tmp_path / source))}
    before = a_run(tmp_path / "x.run", left)
    chosen = None

    try:
        with held_run(
            tmp_path / "x.run", fixed=fixed, resume="never", demo=tmp_path / "demo"
        ) as folder:
            chosen = folder.name
    except UsageError:
        assert fixed
    assert chosen == (None if fixed else "x-2.run")
    assert contents(tmp_path / "x.run") == before


def test_two_runs_in_one_folder_the_second_is_told_who_has_it(tmp_path):
    with (
        held_run(tmp_path, fixed=True, resume="never"),
        pytest.raises(UsageError, match=r"Another job is writing .* \(process \d+ on \S+ since "),
        held_run(tmp_path, fixed=True, resume="never", overwrite=True),
    ):
        pass


PLACES = ("", "model", "report", "attempts/0001", "journal", "plain", "plain/model", "mine",
          "checkpoints", "checkpoints/step-000000005-attempt-0001")  # fmt: skip
STRANGE = ("notes.txt", "model.pt", "rank.log", "state.json.bak", "00.jsonl", ".env")


@given(planted=st.sets(st.tuples(st.sampled_from(PLACES), st.sampled_from(STRANGE)), max_size=8))
def test_to_begin_again_removes_the_run_and_no_file_of_others(tmp_path_factory, planted):
    folder = tmp_path_factory.mktemp("run")
    a_run(folder, {name: {} for name in NAMES})
    for place, name in planted:
        write(folder / place, name)

    with held_run(folder, fixed=True, resume="never", overwrite=True):
        left = {str(path.relative_to(folder)) for path in contents(folder)}

    assert left == {MARKER, *(f"{place}/{name}".lstrip("/") for place, name in planted)}


@given(name=st.sampled_from([f"{p}/{n}".lstrip("/") for p in PLACES for n in STRANGE]))
def test_a_folder_of_somebody_else_is_never_a_runs(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("theirs")
    write(folder, name)

    for resume, overwrite in (("never", False), ("never", True), ("auto", False)):
        with (
            pytest.raises(UsageError, match="not medspark's"),
            held_run(folder, fixed=True, resume=resume, overwrite=overwrite),
        ):
            pass
    assert [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()] == [name]


@pytest.mark.parametrize(
    ("what", "reads"),
    [
        ("the shards", {"shards": Path("run/shards")}),
        ("the shards", {"shards": Path("run")}),
        ("the teacher", {"distill": DistillConfig(teacher=Path("run/model"))}),
        ("the teacher", {"distill": DistillConfig(teacher=Path("link/model"))}),
        ("the file of first weights", {"model": ModelConfig(weights="run/model/a.safetensors")}),
    ],
)
def test_what_a_run_reads_does_not_lie_in_its_folder(tmp_path, monkeypatch, what, reads):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to("run")
    given = {"shards": Path("shards"), "model": ModelConfig(), "distill": None} | reads

    with pytest.raises(
        UsageError, match=rf"{what} \(\S+\) should not lie inside|should not lie inside {what}"
    ):
        check_run_folder(Path("run"), fixed=True, **given)


def test_neighbours_and_weights_of_the_hub_are_no_reason(tmp_path):
    check_run_folder(
        tmp_path / "run",
        fixed=True,
        shards=tmp_path / "shards",
        model=ModelConfig(weights="pretrained"),
        distill=DistillConfig(teacher=tmp_path / "run-before" / "model"),
    )


def test_a_result_that_an_earlier_version_kept_comes_back_with_eps_as_a_fraction(tmp_path):
    keep_result(tmp_path, {"attacks": [{"name": "pgd", "eps_255": 2}]}, run="r", asked="a")

    found = kept_result(tmp_path, run="r", asked="a")

    assert found == {"attacks": [{"name": "pgd", "eps": 2 / 255}]}


def test_a_kept_result_comes_back_where_the_same_was_asked(tmp_path):
    keep_result(tmp_path, {"steps": 3}, run="r", asked="a")

    assert kept_result(tmp_path, run="r", asked="a") == {"steps": 3}
    assert kept_result(tmp_path, run="r", asked="b") is None
    assert kept_result(tmp_path / "other", run="r", asked="a") is None
    with pytest.raises(UsageError, match="holds a run with other data or another configuration"):
        kept_result(tmp_path, run="s", asked="a")
