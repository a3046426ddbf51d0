"""The detection job: a guard beside the model, one table, and a run that goes on when killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bright_halves import ROWS, pictures, save_network, write_halves

from medspark.defend.detect.guard import load_guard
from medspark.defend.detect.served import GuardedPredictor
from medspark.files import sha256_of
from medspark.models.checkpoint import load_classifier
from medspark.track.models import fetch_model

Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_halves(tmp_path_factory.mktemp("detect") / "shards")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_network(tmp_path_factory.mktemp("model") / "network")


@pytest.fixture
def run(tmp_path: Path, shards: Path, model: Path, load_job) -> Run:
    """Return a function that runs the job with further arguments."""
    module = load_job("detect")

    def started(*more: str, folder: str = "work") -> tuple[int, dict[str, Any]]:
        output = tmp_path / f"{folder}.json"
        words = (
            f"--model={model} --shards={shards} --detectors=kde,lid --layers=penultimate,logits "
            f"--attacks=fgsm,pgd --eps=16/255 --steps=4 --fit.reference_images=60 "
            f"--fit.contrast_images=60 --fit.validation_images=80 --adaptive.steps=4 "
            f"--adaptive.attacks=selective --folder={tmp_path / folder} "
            f"--guard_folder={tmp_path / f'{folder}-guard'} "
            f"--track.uri=sqlite:///{tmp_path / 'mlflow.db'} --track.system_metrics=false "
            f"--track.log_model=false --output={output}"
        )
        # A key that is given twice would hold both lists.
        given = dict(word.split("=", 1) for word in [*words.split(), *more])
        status = module.main([f"{key}={value}" for key, value in given.items()])
        return status, json.loads(output.read_text()) if output.exists() else {}

    return started


@pytest.mark.spark
@pytest.mark.slow
def test_a_guard_is_kept_and_the_report_is_the_same_after_a_kill(
    spark, run: Run, model: Path, tmp_path: Path, capsys
) -> None:
    status, whole = run("--guard=refuse")
    said = capsys.readouterr().out
    (folder,) = (path for path in (tmp_path / "work").iterdir() if path.is_dir())
    kept = [
        *(folder / "choosing").iterdir(),
        *(folder / "calibration").iterdir(),
        folder / "fitted" / "fitted.json",
    ]
    stamps = [path.stat().st_mtime_ns for path in kept]
    next((folder / "test").iterdir()).unlink()
    again_status, again = run("--guard=refuse")

    assert (status, again_status) == (0, 0)
    assert [path.stat().st_mtime_ns for path in kept] == stamps
    for part in ("detectors", "chosen", "false_positives", "flags", "surrogates"):
        assert again[part] == whole[part]
    guard, card = load_guard(Path(whole["guard"]))
    assert (guard.action, card.network) == ("refuse", sha256_of(model / "model.safetensors"))
    assert whole["chosen"]["name"] == guard.detector.name
    assert set(whole["false_positives"]["sites"]) == {"north", "south"}
    assert "oblivious / adaptive" in said
    assert "adaptive wrong and undetected" in Path(whole["report"]).read_text()


@pytest.mark.spark
@pytest.mark.slow
def test_the_model_in_mlflow_holds_its_guard_and_answers_with_it(
    spark, run: Run, model: Path, tmp_path: Path
) -> None:
    _, result = run("--track.log_model=true", "--guard=refuse", "--fpr=0.3", "--detectors=kde")

    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    kept = fetch_model(f"runs:/{result['mlflow']['run_id']}/model", uri=store)
    answers = GuardedPredictor.load(kept).answers(pictures("test")[0])
    suspicious = [answer["suspicious"] for answer in answers]
    assert sum(suspicious) / len(suspicious) == result["false_positives"]["rate"]
    assert [set(a) == {"suspicious", "p_value"} for a in answers] == suspicious
    assert load_classifier(kept).architecture == load_classifier(model).architecture


@pytest.mark.spark
@pytest.mark.slow
def test_the_report_is_the_same_however_it_is_shared_out(spark, run: Run) -> None:
    _, whole = run("--piece=100")
    _, cut = run("--piece=10", "--batch_size=7", folder="cut")

    assert cut["images"] == whole["images"] == ROWS["test"]
    assert cut["chosen"]["name"] == whole["chosen"]["name"]
    for one, other in zip(cut["detectors"], whole["detectors"], strict=True):
        assert one["auroc"] == pytest.approx(other["auroc"], abs=0.01)
        assert one["fooled"] == other["fooled"]


@pytest.mark.spark
@pytest.mark.slow
def test_rank_pca_is_attacked_and_its_defence_reported(run: Run) -> None:
    _, result = run("--detectors=rank_pca,bu", "--adaptive.attacks=leading,weighted")

    layers = {(row["name"], row["layer"]) for row in result["detectors"]}
    assert {("rank_pca", "uncentred"), ("rank_pca", "centred")} < layers
    assert {row["layer"] for row in result["rank_defence"]} == {"uncentred", "centred"}
    (surrogate,) = (key for key in result["surrogates"] if key.startswith("rank_pca"))
    assert set(result["surrogates"][surrogate]) == {"clean", "attacked"}


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        ("--model=/no/such/model", "'/no/such/model' is not a medspark model"),
        ("--shards=/no/such/shards", "There is no shard folder"),
        ("--attacks=transfer", "transfer needs a surrogate"),
        ("--eps=0,2/255", "every budget is larger than 0"),
        ("--layers=backbone.nothing", "the network has no layer 'backbone.nothing'"),
        ("--detectors=kde,bu", ""),
        ("--layers=logits --detectors=bu", "none of bu can look at the layers logits"),
        ("--layers=logits --detectors=bu,kde", "bu looks at the layer penultimate"),
        ("--fpr=0.01", "a rate of 0.01 needs 99 validation images for the threshold"),
        ("--detectors=kd", "detectors.0 cannot be 'kd'"),
    ],
)
def test_misuse_is_one_sentence_before_spark_starts(
    run: Run, capsys, monkeypatch, load_job, mistake: str, sentence: str
) -> None:
    def no_session(*_: object, **__: object) -> None:
        raise AssertionError("Spark was started")

    monkeypatch.setattr(load_job("detect"), "spark_session", no_session)
    status, _ = run(*mistake.split())

    message = capsys.readouterr().err
    if sentence:
        assert status == 2
        assert sentence in message
        assert "Traceback" not in message
    else:
        assert "Spark was started" in message


def test_a_guard_folder_with_files_of_others_is_left_alone(
    run: Run, tmp_path: Path, capsys
) -> None:
    theirs = tmp_path / "work-guard" / "notes.txt"
    theirs.parent.mkdir()
    theirs.write_text("theirs")

    status, _ = run()

    assert status == 2
    assert "is not empty and not medspark's" in capsys.readouterr().err
    assert list(theirs.parent.iterdir()) == [theirs]
