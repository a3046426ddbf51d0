"""The table of recipes as a user meets it: its stages and report, kills, and mistakes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import array_shards
import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from medspark.study.recipe_report import RecipeCell, RecipeTableResult
from medspark.workflows import recipe_table

ROOT = Path(__file__).parents[2]
TINY = (
    *("--model.name", "test_resnet", "--train.epochs", "1", "--train.batch_size", "8"),
    *("--train.validation_steps", "1", "--train.monitor.action", "off"),
    *("--screen.steps", "1", "--screen.sanity_images", "0", "--screen.bootstrap", "0"),
    *("--evaluate.attacks", "pgd_margin", "--evaluate.steps", "1", "--evaluate.bootstrap", "0"),
    *("--evaluate.sanity_images", "0", "--track.system_metrics", "false", "--margin", "1"),
    *("--calibration_steps", "4", "--recipes.ema.train.ema", "0.5"),
)
TWO = ("--recipes.plain.train.mode", "standard", "--launch.processes", "2")
ONE = ("--seeds", "0", "--launch.processes", "1")
# Every recipe gets one step, however fast the machine is.
ONE_STEP = (*ONE, "--seconds", "1e-9")

Run = Callable[..., tuple[int, RecipeTableResult]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of two classes that differ in a bright square."""
    draw = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", 24), ("val", 16), ("test", 12)):
        labels = np.arange(count) % 2
        pixels = draw.integers(50, 150, (count, 16, 16, 1))
        pixels[:, 4:10, 4:10] += 90 * labels[:, None, None, None]
        splits[split] = pixels.astype(np.uint8), labels
    return array_shards.write_arrays(tmp_path_factory.mktemp("x") / "shards", splits, shards=2)


def command(shards: Path, place: Path, *more: str) -> list[str]:
    own = ("--shards.phantom", shards, "--folder", place / "work", "--output",
           place / "result.json", "--track.uri", f"sqlite:///{place}/mlflow.db")  # fmt: skip
    return [*TINY, *map(str, own), *more]


@pytest.fixture
def run(spark, load_job, shards: Path) -> Run:
    def started(place: Path, *more: str) -> tuple[int, RecipeTableResult]:
        place.mkdir(exist_ok=True)
        status = load_job("recipe_table").main(command(shards, place, *more))
        document = json.loads((place / "result.json").read_text())
        del document["job"], document["versions"]
        return status, RecipeTableResult.model_validate(document)

    return started


def plan(result: RecipeTableResult) -> list[tuple[str, str, int]]:
    return [(cell.stage, cell.recipe, cell.seed) for cell in result.cells]


@pytest.mark.spark
@pytest.mark.ddp
@pytest.mark.slow
def test_all_recipes_are_screened_in_equal_time_and_the_finalist_is_tested_beside_the_default(
    run: Run, tmp_path: Path, monkeypatch, capsys
) -> None:
    trained: list[int] = []
    really = recipe_table.train_once

    def train(config: Any, *rest: Any, **more: Any) -> Any:
        trained.append(config.seed)
        return really(config, *rest, **more)

    monkeypatch.setattr(recipe_table, "train_once", train)
    # Networks give one answer after so few steps, which is a flag, and flagged ones are not chosen.
    monkeypatch.setattr(RecipeCell, "flagged", False)
    more = (*TWO, "--seeds", "0,1", "--finalists", "1")

    status, result = run(tmp_path, *more)

    (best,) = result.finalists
    finalists = [(recipe, seed) for recipe in ("default", best) for seed in (0, 1)]
    assert status == 0
    assert plan(result) == [
        *(("calibration", recipe, 0) for recipe in ("default", "ema", "plain")),
        *(("screening", recipe, 0) for recipe in ("default", "ema", "plain")),
        ("screening", "default", 1), ("screening", best, 1),
        *(("test", *each) for each in finalists),
    ]  # fmt: skip
    assert trained == [0, 0, 0, 0, 0, 0, 1, 1]  # the tested networks are those that were screened
    assert all(cell.status == "finished" for cell in result.cells)
    assert_equal_time(result)
    assert result.screened[0].recipe in ("default", best)
    assert result.chosen in ("default", best)
    assert_reported(result, capsys.readouterr().out)
    assert_nested(MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"), result)

    status, again = run(tmp_path, *more)

    assert (status, len(trained)) == (0, 8)
    assert again.cells == result.cells


def assert_equal_time(result: RecipeTableResult) -> None:
    """Assert that the steps of every recipe follow from its measured speed and the default's."""
    assert result.cells[3].steps == 3  # an epoch
    budget = 3 * (result.cells[0].seconds_per_step or 0)
    for cell, screened in zip(result.cells[:3], result.cells[3:6], strict=True):
        assert cell.seconds_per_step is not None
        assert (cell.trained_steps, screened.budget) == (4, pytest.approx(budget))
        assert screened.steps == max(1, round(budget / cell.seconds_per_step))
        assert screened.trained_steps == screened.steps


def assert_reported(result: RecipeTableResult, said: str) -> None:
    text = Path(result.table).read_text()
    assert text.strip() in said
    assert "| clean AUROC | clean balanced | worst 1/255 accuracy | worst 1/255 balanced |" in text
    assert "worst 4/255 AUROC" in text
    screening, test = text.split("## Test: ")
    assert screening.count("| phantom | ") == 3
    assert test.count("| phantom | ") == 2
    assert "- recipe ema: train.ema 0.5" in text
    assert Path(result.figure).stat().st_size > 0
    assert "screening,phantom,plain,0" in Path(result.csv).read_text()


def assert_nested(client: MlflowClient, result: RecipeTableResult) -> None:
    """Assert that each cell is a child of the table, and its runs are children of the cell."""
    runs = client.search_runs(["1"], max_results=100)
    children: dict[str | None, list[str]] = {}
    for found in runs:
        parent = found.data.tags.get("mlflow.parentRunId")
        children.setdefault(parent, []).append(found.info.run_id)
        assert found.info.status == "FINISHED"
    assert children[None] == [result.mlflow["run_id"]]
    assert len(children[result.mlflow["run_id"]]) == len(result.cells)
    # A screening trains and attacks; a test only attacks; a timing is a run itself.
    counts = [len(children.get(cell, ())) for cell in children[result.mlflow["run_id"]]]
    assert sorted(counts) == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2]


@pytest.mark.spark
@pytest.mark.ddp
@pytest.mark.slow
def test_a_killed_table_goes_on_with_the_same_cells_as_an_unbroken_one(
    run: Run, shards: Path, tmp_path: Path
) -> None:
    words = command(shards, tmp_path, *ONE_STEP, "--spark.master", "local[2]")
    job = subprocess.Popen(
        [sys.executable, ROOT / "jobs" / "recipe_table.py", *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while len(done := cells_in(tmp_path)) < 3:
        assert job.poll() is None, "the table ended"
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()

    status, result = run(tmp_path, *ONE_STEP)

    _, whole = run(tmp_path / "whole", *ONE_STEP)
    assert status == 0
    assert done.items() <= cells_in(tmp_path).items()
    assert len(cells_in(tmp_path)) == len(result.cells) >= 5
    assert [figures(cell) for cell in result.cells] == [figures(cell) for cell in whole.cells]
    assert (result.chosen, result.finalists) == (whole.chosen, whole.finalists)


def cells_in(folder: Path) -> dict[str, int]:
    """Return the finished cells, and when each was written."""
    return {p.name: p.stat().st_mtime_ns for p in (folder / "work" / "cells").glob("*.json")}


def figures(cell: Any) -> dict[str, Any]:
    timings = {"seconds", "seconds_per_step", "train_seconds"}
    return {key: value for key, value in cell.model_dump().items() if key not in timings}


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--recipes.a.train.ema 0.9", "shards is needed"),
        ("--shards.x /nowhere --recipes.a.train.ema 0.9", "There is no shard folder /nowhere."),
        ("--shards.x {shards}", "There are no recipes: give --recipes.NAME.train.KEY VALUE"),
        (
            "--shards.x {shards} --recipes.a.train.emma 0.9",
            "recipes.a.train.emma: there is no such key.",
        ),
        (
            "--shards.x {shards} --recipes.a.train.ema 2",
            "recipes.a.train.ema: Input should be less than 1.",
        ),
        ("--shards.x {shards} --recipes.a.attack.eps 2/255", "recipes.a.attack.eps: a recipe"),
        ("--shards.x {shards} --recipes.default.train.ema 0.9", "recipes.default: the default"),
        (
            "--shards.x {shards} --recipes.a.train.mode standard --recipes.a.train.awp 0.01",
            "recipes.a: train.awp raises the loss of attacked images",
        ),
        (
            "--shards.x {shards} --recipes.a.train.ema 0.9 --screen.eps 1/255",
            "screen.eps: attack.eps 2/255 has to be among the budgets",
        ),
        (
            "--shards.x {shards} --recipes.a.train.ema 0.9 --screen.split test",
            "screen.split cannot be 'test'",
        ),
        ("--shards.x {shards} --recipes.a.train.ema 0.9 --seeds 0,0", "seeds: 0, 0 names one of"),
        ("--shards.x {shards} --recipes.a.train.ema 0.9 --model.name resnet5", "model.name: timm"),
        ("--shards.x {shards} --recipes.a.train.ema 0.9 --seconds 0", "seconds cannot be '0'"),
    ],
)
def test_misuse_is_one_sentence_before_spark_starts(
    load_job, shards: Path, tmp_path: Path, monkeypatch, capsys, argv: str, sentence: str
) -> None:
    monkeypatch.setattr(recipe_table, "spark_session", None)
    monkeypatch.chdir(tmp_path)

    status = load_job("recipe_table").main(argv.format(shards=shards).split())

    said = capsys.readouterr().err.strip()
    assert status == 2
    assert said.startswith(f"recipe_table: {sentence}")
    assert "\n" not in said
