"""jobs/distill.py as a user calls it: a teacher, a student, and what is kept of the student."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from mlflow.tracking import MlflowClient

from medspark.models.checkpoint import load_classifier


@pytest.fixture(scope="module")
def job(load_job: Callable[[str], ModuleType]) -> ModuleType:
    return load_job("distill")


@pytest.mark.spark
@pytest.mark.ddp
@pytest.mark.slow
def test_a_small_student_learns_from_a_teacher_of_another_architecture(
    spark,
    job: ModuleType,
    network: Path,
    write_shards: Callable[..., Path],
    tmp_path: Path,
    capsys,
) -> None:
    store, output = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "result.json"

    status = job.main(
        [
            *(
                "--shards",
                str(write_shards(rows=16, side=32)),
                "--distill.teacher",
                str(network),
            ),
            *("--distill.method", "kd", "--model.name", "resnet10t", "--train.epochs", "2"),
            *("--train.batch_size", "8", "--evaluate.steps", "1", "--evaluate.sanity_images", "0"),
            *("--launch.processes", "1", "--track.uri", store, "--track.system_metrics", "false"),
            *("--output", str(output)),
        ]
    )

    said = capsys.readouterr().out
    assert status == 0
    assert "| student (kd)" in said  # smaller, and no more robust for it
    result = json.loads(output.read_text())
    assert (result["job"], result["mode"], result["steps"]) == ("distill", "kd", 4)
    assert load_classifier(Path(result["model"])).architecture == "resnet10t"
    run = MlflowClient(store).get_run(result["mlflow"]["run_id"])
    assert (run.info.status, run.data.params["distill.method"]) == ("FINISHED", "kd")


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("", "distill is needed: give --distill.teacher."),
        ("--distill.teacher /nowhere", "'/nowhere' is not a medspark model"),
        (
            "--distill.teacher {teacher} --distill.method hinton",
            "distill.method cannot be 'hinton'",
        ),
        (
            "--distill.teacher {teacher} --launch.processes 2 --spark.master local[2] "
            "--train.batch_size 1",
            "train.batch_size 1 is too small: in every step some of the 2 processes have no image",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2_before_spark_starts(
    job: ModuleType,
    network: Path,
    argv: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch,
    capsys,
) -> None:
    monkeypatch.chdir(tmp_path)

    status = job.main(argv.format(teacher=network).split())

    said = capsys.readouterr().err.strip()
    assert status == 2
    assert said.startswith("distill: ")
    assert sentence in said
    assert "\n" not in said
