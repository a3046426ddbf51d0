"""jobs/denoise.py as a user calls it: a guarded model, what is kept of it, and what takes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bright_halves import save_network, write_halves
from guarded_networks import build_guarded
from mlflow.tracking import MlflowClient

from medspark.models.card import read_card
from medspark.models.checkpoint import describe, save_classifier
from medspark.workflows.denoise import DenoiseAtConfig, training_of

QUICK = [
    *("--train.epochs", "2", "--train.batch_size", "40", "--train.validation_steps", "1"),
    *("--attack.eps", "16/255", "--denoise.shape.depth", "1", "--denoise.shape.width", "16"),
    *("--evaluate.eps", "16/255", "--evaluate.steps", "1", "--evaluate.sanity_images", "4"),
    *("--judge.adaptive.attacks", "selective", "--judge.adaptive.steps", "2"),
    *("--track.system_metrics", "false"),
]


@pytest.fixture(scope="module")
def job(load_job: Callable[[str], ModuleType]) -> ModuleType:
    return load_job("denoise")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("denoise")
    shards, model = write_halves(folder / "shards"), save_network(folder / "network")
    return ["--shards", str(shards), "--model", str(model)]


@pytest.mark.parametrize(("given", "rate"), [({}, 3e-3), ({"lr": 3e-4}, 3e-4)])
def test_a_denoiser_learns_at_a_higher_rate_unless_one_is_given(
    given: dict[str, float], rate: float, data: list[str]
) -> None:
    _, shards, _, model = data
    asked = {"shards": shards, "model": model, "train": {"epochs": 2} | given}

    train = training_of(DenoiseAtConfig.model_validate(asked)).train

    assert (train.lr, train.epochs) == (rate, 2)


@pytest.mark.spark
@pytest.mark.ddp
@pytest.mark.slow
def test_two_ranks_guard_a_model_and_the_guarded_model_is_evaluated_and_tracked(
    spark, job: ModuleType, load_job, data: list[str], tmp_path: Path, capsys
) -> None:
    store, output = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "result.json"
    track = ["--track.uri", store]

    status = job.main([*data, *QUICK, *track, "--launch.processes", "2", "--output", str(output)])

    said = capsys.readouterr().out
    assert status == 0
    assert "| PSNR (dB) |" in said
    assert "adaptive wrong and undetected" in said
    result = json.loads(output.read_text())
    assert (result["job"], result["mode"], result["world_size"]) == ("denoise", "denoise", 2)
    names = [attack["name"] for attack in result["attacks"]]
    assert names == ["fgsm", "pgd", "bpda_pgd", "unguarded_pgd"]
    folder = Path(result["model"])
    assert read_card(folder).kind == "guarded"
    assert "SSIM" in (folder.parent / "report" / "robustness.md").read_text()
    run = MlflowClient(store).get_run(result["mlflow"]["run_id"])
    assert run.data.params["denoise.through"] == "False"
    assert run.data.metrics["test/clean/psnr"] == pytest.approx(result["clean"]["psnr"])
    assert "detector/adaptive/auroc" in run.data.metrics

    evaluated = _evaluate(load_job, folder, data[1], tmp_path, *track)
    assert [a["name"] for a in evaluated["attacks"]] == ["fgsm", "bpda_pgd", "unguarded_pgd"]
    assert evaluated["clean"]["accuracy"] == result["clean"]["accuracy"]
    assert "PSNR denoised" in Path(evaluated["report"]).read_text()


def _evaluate(load_job: Any, model: Path, shards: str, folder: Path, *more: str) -> dict[str, Any]:
    output = folder / "evaluation.json"
    words = [
        *("--model", str(model), "--shards", shards, "--attacks", "fgsm", "--eps", "16/255"),
        *("--steps", "1", "--bootstrap", "0", "--sanity_images", "0", "--gallery", "2"),
        *("--folder", str(folder / "evaluations"), "--output", str(output), *more),
    ]
    assert load_job("evaluate").main(words) == 0
    return dict(json.loads(output.read_text()))


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--shards {shards}", "model is needed: give --model."),
        ("--model /nowhere --shards {shards}", "'/nowhere' is not a medspark model"),
        ("--model {model} --shards /nowhere", "/nowhere"),
        ("--model {model} --shards {shards} --attack.eps 0", "so eps is larger than 0"),
        ("--model {model} --shards {shards} --denoise.attacks cw", "denoise.attacks.0 cannot be"),
        (
            "--model {model} --shards {shards} --denoise.shape.heads 3",
            "3 heads do not divide a width of 128",
        ),
        (
            "--model {model} --shards {shards} --judge.fpr 0.01",
            "a rate of 0.01 needs 99 validation images for the threshold, and there are 80",
        ),
        ("--model {model} --shards {shards} --train.dual_bn", "train.dual_bn: the classifier"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2_before_spark_starts(
    job: ModuleType, data: list[str], argv: str, sentence: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)

    status = job.main(argv.format(shards=data[1], model=data[3]).split())

    said = capsys.readouterr().err.strip()
    assert status == 2
    assert said.startswith("denoise: ")
    assert sentence in said
    assert "\n" not in said


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("denoise", "--model {guarded} --shards {shards}"),
        ("prune", "--model {guarded} --shards {shards}"),
        ("federate", "--model.name test_resnet --model.weights {guarded} --shards {shards}"),
    ],
)
def test_who_cannot_take_a_guarded_model_says_so(
    load_job, name: str, argv: str, data: list[str], guarded: Path, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)

    status = load_job(name).main(argv.format(guarded=guarded, shards=data[1]).split())

    assert status == 2
    assert "a model of kind guarded; this takes one of kind" in capsys.readouterr().err


@pytest.mark.usefixtures("no_session")
def test_attacks_on_denoisers_need_one(load_job, data: list[str], tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    status = load_job("evaluate").main([*data, "--attacks", "pgd,bpda_pgd"])

    assert status == 2
    assert "bpda_pgd can attack a model with a denoiser only" in capsys.readouterr().err


@pytest.fixture
def guarded(tmp_path: Path) -> Path:
    network = build_guarded(side=16)
    card = describe(network, classes=("a", "b"), height=16, width=16)
    save_classifier(tmp_path / "guarded", network, card)
    return tmp_path / "guarded"
