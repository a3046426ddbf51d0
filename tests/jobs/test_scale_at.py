"""scale_at as a user meets it: one run with children, resumed, compared; and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from pyspark.sql import SparkSession

from medspark.errors import RunError, UsageError
from medspark.study.sweep import ScaleCell
from medspark.workflows import scale_at as scaling
from medspark.workflows.scale_at import scale_at, summary_text
from medspark.workflows.scale_grid import ScaleAtConfig


@pytest.fixture(scope="module")
def job(load_job: Callable[[str], ModuleType]) -> ModuleType:
    return load_job("scale_at")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture
def config(place: Path, write_shards: Callable[..., Path]) -> ScaleAtConfig:
    """One network on one and two processes, and on three, for which there is no room."""
    return ScaleAtConfig.model_validate(
        {
            "shards": write_shards(rows=48, side=32),
            "folder": place / "first",
            "repeats": 1,
            "grid": {"processes": (1, 2, 3), "data": (0.5,), "mode": ("standard",), "plain": False},
            "model": {"name": "resnet10t"},
            "train": {"epochs": 1, "batch_size": 8},
            "test": {"steps": 1, "images": 8, "validation_images": 4},
            "warmup_steps": 1,
            "track": {"uri": f"sqlite:///{place / 'mlflow.db'}", "patience_seconds": 5},
        }
    )


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The folders that something is trained in."""
    seen: list[Any] = []
    real = scaling.train_once

    def watched(config: Any, spark: Any, folder: Path, **more: Any) -> Any:
        seen.append(folder)
        return real(config, spark, folder, **more)

    monkeypatch.setattr(scaling, "train_once", watched)
    return seen


def run_id(config: ScaleAtConfig) -> str:
    """Return the run of the sweep in MLflow."""
    return str(json.loads((config.place / "sweep" / "run.json").read_text())["run_id"])


@pytest.mark.slow
@pytest.mark.spark
@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")
def test_a_sweep_is_one_run_with_children_and_a_failed_cell_does_not_end_it(
    config: ScaleAtConfig, spark: SparkSession, trained: list[Any]
) -> None:
    with pytest.raises(RunError, match=r"1 of 3 cells failed: .* \(launch.processes is 3, but"):
        scale_at(config)

    assert len(trained) == 3
    client = MlflowClient(str(config.track.uri))
    parent = client.get_run(run_id(config))
    assert parent.info.status == "FAILED"
    assert "| network, mode |" in parent.data.tags["mlflow.note.content"]
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"report.html", "sweep.json", "table.md", "throughput.png", "robustness.png"} <= files
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    )
    assert sorted(run.info.status for run in children) == ["FAILED", "FINISHED", "FINISHED"]
    for run in children:
        params = run.data.params
        assert {"world_size", "threads_per_rank", "data_share", "model", "mode", "repeat"} <= set(
            params
        )
    (two,) = [
        run for run in children
        if run.data.params["world_size"] == "2"
    ]  # fmt: skip
    for name in (
        "images_per_second", "data_wait_share", "communication_share", "startup_seconds",
        "peak_memory_mb", "core_seconds_per_million_images", "efficiency",
    ):  # fmt: skip
        history = client.get_metric_history(two.info.run_id, f"scale/{name}")
        assert [metric.step for metric in history] == [0], name
    assert "test/worst_case/eps_2_255/accuracy" in two.data.metrics
    (three,) = [run for run in children if run.info.status == "FAILED"]
    assert three.data.tags["medspark.error"].startswith("UsageError: launch.processes is 3")


@pytest.mark.slow
@pytest.mark.spark
@pytest.mark.filterwarnings("ignore")
def test_what_is_done_is_not_done_again_and_sweeps_are_set_side_by_side(
    config: ScaleAtConfig, spark: SparkSession, trained: list[Any], place: Path
) -> None:
    first = json.loads((place / "first" / "report" / "sweep.json").read_text())

    cells = [path.parent for path in (place / "first" / "cells").glob("*/run.json")]
    theirs = [cell / name / "x.txt" for cell in cells for name in ("", "attempts", "model")]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_text("theirs")

    with pytest.raises(RunError, match="1 of 3 cells failed"):
        scale_at(config)
    grid = config.grid.model_copy(update={"processes": (1, 2)})
    again = scale_at(config.model_copy(update={"grid": grid}))
    compared = scale_at(
        ScaleAtConfig.model_validate(
            {
                "compare": (str(place / "first"), again["mlflow"]["run_id"]),
                "folder": place / "both",
                "track": config.track,
            }
        )
    )

    assert len(trained) == 1  # the one that failed
    assert [path.read_text() for path in theirs] == 9 * ["theirs"]
    assert again["mlflow"]["run_id"]
    done = [c["fingerprint"] for c in first["cells"] if c["status"] == "finished"]
    assert [c["fingerprint"] for c in again["cells"]] == done
    page = Path(compared["report"]).read_text()
    assert page.count("<h2>first</h2>") == 2
    assert "data:image/png;base64," in page
    assert "Report:" in summary_text(again)


def test_efficiency_is_taken_against_one_process_of_the_same_repeat(place: Path) -> None:
    cells = [
        ScaleCell.model_validate_json(path.read_bytes())
        for path in (place / "first" / "cells").glob("*/measured.json")
    ]
    if not cells:
        pytest.skip("the sweep above was not run")
    one, two = sorted(cells, key=lambda m: m.point.world_size)

    assert one.efficiency is None
    assert two.efficiency == pytest.approx(two.images_per_second / (2 * one.images_per_second))
    assert one.point.threads_per_rank == two.point.threads_per_rank
    assert two.startup["total"] == pytest.approx(
        sum(took for part, took in two.startup.items() if part != "total")
    )


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--grid.process 2", "There is no key grid.process; did you mean grid.processes?"),
        ("--grid.processes 0,1", "grid.processes.0 cannot be 0: input should be greater than"),
        ("--grid.data 0.5,2", "grid.data.1 cannot be 2: input should be less than or equal"),
        ("--grid.mode standrad", "grid.mode.0: there is no mode 'standrad'; there are standard"),
        ("--grid.mode pgd+dual_bn", "grid.mode: pgd+dual_bn learns from one kind of image alone."),
        ("--grid.scaling sideways", "grid.scaling.0 cannot be 'sideways'"),
        ("--grid.model resnet5O", "model.name: timm has no model 'resnet5O'"),
        ("--repeats 0", "repeats cannot be '0'"),
        ("--shards /nowhere", "There is no shard folder /nowhere."),
        (
            "--spark.master local[2] --grid.processes 1,2 --train.batch_size 1",
            "train.batch_size 1 is too small: in every step some of the 2 processes have no image",
        ),
        ("--spark.master local[2] --grid.processes 1,4", "grid.processes goes up to 4, but Spark"),
        pytest.param(
            "--data.reader petastorm --grid.data 0.5",
            "data.share needs the native reader",
            marks=pytest.mark.petastorm,
        ),
        ("--shards {shards} --grid.data 0.01", "grid.data: 0.01 of 48 training images is less"),
        ("--compare one", "compare: give two sweeps or more"),
        ("--compare {shards},{shards}", "compare: {shards} is not the folder of a sweep"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2_before_spark_starts(
    job: ModuleType,
    argv: str,
    sentence: str,
    write_shards: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shards = write_shards(rows=48)
    monkeypatch.setattr(scaling, "spark_session", _too_late)
    monkeypatch.chdir(tmp_path)

    status = job.main(argv.format(shards=shards).split())

    said = capsys.readouterr().err.strip()
    assert status == 2, said
    assert said.startswith("scale_at: " + sentence.format(shards=shards)), said
    assert "\n" not in said


def _too_late(*_: object, **__: object) -> None:
    raise AssertionError("Spark was started")


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"\xff"])
def test_a_damaged_sweep_cannot_be_compared_and_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "sweep.json").write_bytes(content)
    config = ScaleAtConfig(compare=(str(tmp_path), str(tmp_path)))

    with pytest.raises(
        UsageError, match=r"compare: .*sweep\.json is no record of a sweep: "
    ) as raised:
        scale_at(config)

    assert len(str(raised.value).splitlines()) == 1
