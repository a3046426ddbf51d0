"""The recalibration job: a new version of the model, its figures, and misuse in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from array_shards import write_arrays
from mlflow.tracking import MlflowClient

from medspark.evaluate.decision import probability
from medspark.models.card import Decision, Rate, read_card, write_card
from medspark.models.checkpoint import load_classifier
from medspark.models.prediction import decided
from medspark.models.predictor import Predictor

Run = Callable[..., tuple[int, dict[str, Any]]]
COUNT = 80


@pytest.fixture
def shards(tmp_path: Path, network: Path) -> Path:
    """Images whose labels follow the network's scores, but for noise and a shift."""
    coarse = torch.rand(COUNT, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, 32, mode="bilinear")
    stored = (255 * smooth).numpy().astype(np.uint8).transpose(0, 2, 3, 1)
    with torch.inference_mode():
        logits = load_classifier(network)(torch.from_numpy(stored / np.float32(255))
                                          .permute(0, 3, 1, 2)).numpy()  # fmt: skip
    scores = logits[:, 1] - logits[:, 0]
    order = (scores - np.median(scores)) / scores.std()
    labels = np.random.default_rng(0).random(COUNT) < probability(4 * (order - 0.5))
    site = stored, labels.astype(int)
    return write_arrays(tmp_path / "site", {"train": site, "val": site, "test": site})


@pytest.fixture
def run(tmp_path: Path, shards: Path, network: Path, load_job) -> Run:
    """Return a function that runs the job with further arguments."""
    module = load_job("recalibrate")

    def started(*more: str) -> tuple[int, dict[str, Any]]:
        output = tmp_path / "result.json"
        output.unlink(missing_ok=True)
        status = module.main(
            [
                f"--model={network}",
                f"--shards={shards}",
                "--images=50",
                "--bootstrap=20",
                "--track.log_model=false",
                f"--track.uri=sqlite:///{tmp_path / 'mlflow.db'}",
                "--track.system_metrics=false",
                f"--output={output}",
                *more,
            ]
        )
        return status, json.loads(output.read_text()) if output.exists() else {}

    return started


def decide(network: Path, *, right: int, threshold: float = 0.5, target: float = 0.9) -> None:
    """Give the network a decision under which ``right`` of 200 images of each class were right."""
    rate = Rate(right=right, images=200)
    decision = Decision(
        positive="b", threshold=threshold, criterion="sensitivity", target=target,
        sensitivity=rate, specificity=rate,
    )  # fmt: skip
    write_card(network, read_card(network).model_copy(update={"decision": decision}))


def test_the_new_version_has_the_old_weights_and_decides_for_the_site(
    run: Run, network: Path, shards: Path, tmp_path: Path
) -> None:
    before = (network / "model.json").read_bytes()

    status, result = run()

    assert status == 0
    made = Path(result["model"])
    assert made == tmp_path / "result.run" / "model"
    name = "model.safetensors"
    assert (made / name).read_bytes() == (network / name).read_bytes()
    assert (network / "model.json").read_bytes() == before
    card = read_card(made)
    assert card.temperature == result["temperature"]["value"]
    assert card.decision.threshold == result["threshold"]["value"]
    assert card.recalibrated.images == 50
    assert card.recalibrated.dataset_digest == result["dataset_digest"]
    for figure in ("temperature", "threshold", "sensitivity", "specificity"):
        found = result[figure]
        assert found["low"] <= found["value"] <= found["high"]
    assert result["images_needed"] == max(result["images_needed_for"].values()) > 0


def test_it_answers_the_site_better_than_before(run: Run, network: Path, shards: Path) -> None:
    _, result = run("--decision.youden=true")

    from medspark.data.native import MappedSplit
    from medspark.shards.manifest import read_manifest

    split = MappedSplit(shards, read_manifest(shards), "test")
    images, labels = split.gather(np.arange(COUNT))

    def balanced(folder: Path) -> float:
        called = np.array(decided(Predictor.load(folder)(images), read_card(folder))) == "b"
        return float((called[labels == 1].mean() + (~called[labels == 0]).mean()) / 2)

    assert balanced(Path(result["model"])) > balanced(network) + 0.1


def test_the_goal_and_the_attack_are_the_cards_unless_others_are_asked_for(
    run: Run, network: Path
) -> None:
    decide(network, right=180)

    _, kept = run()
    _, asked = run("--decision.specificity=0.7", "--decision.under=pgd", "--steps=2")

    assert (kept["decision"]["criterion"], kept["decision"]["target"]) == ("sensitivity", 0.9)
    assert kept["before"]["threshold"] == pytest.approx(0.5)
    assert asked["decision"]["criterion"] == "specificity"
    assert (asked["decision"]["under"], asked["decision"]["eps"]) == ("pgd", 2 / 255)
    assert kept["model"] != asked["model"]


def test_a_site_that_differs_by_more_than_chance_is_a_warning(run: Run, network: Path) -> None:
    _, uncalibrated = run()
    decide(network, right=199)
    _, other = run()

    assert "the calibrated probabilities do not fit the labels" in uncalibrated["warning"]
    assert "by Fisher's exact test" in other["warning"]
    assert "/200 there" in other["warning"]


def test_a_site_like_the_one_before_is_none(run: Run, tmp_path: Path) -> None:
    _, first = run("--decision.sensitivity=0.9")

    _, again = run(f"--model={first['model']}", f"--run_dir={tmp_path / 'again'}")

    assert again["warning"] is None
    assert again["temperature"]["value"] == pytest.approx(first["temperature"]["value"], rel=0.5)


def test_the_run_is_in_mlflow_and_the_new_version_under_the_name(
    run: Run, network: Path, tmp_path: Path
) -> None:
    pytest.importorskip("mlflow")
    _, result = run("--track.log_model=true", "--track.register_as=chest")
    _, again = run(f"--model={result['model']}", f"--run_dir={tmp_path / 'again'}")

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (version,) = client.search_model_versions("name='chest'")
    assert version.run_id == result["mlflow"]["run_id"]
    metrics = client.get_run(version.run_id).data.metrics
    assert metrics["site/threshold/value"] == pytest.approx(result["threshold"]["value"])
    tags = client.get_run(again["mlflow"]["run_id"]).data.tags
    assert tags["medspark.from_model"] == version.run_id


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (["--images=81"], "the test split"),
        (["--images=5"], "images"),
        (["--model=none"], "'none' is not a medspark model"),
        (["--decision.positive=c", "--decision.youden=true"], "there is no class 'c'"),
        (["--decision.youden=true", "--decision.sensitivity=0.9"], "give one of"),
        (["--run_dir={network}"], "should not lie inside"),
    ],
)
def test_misuse_is_one_sentence(run: Run, network: Path, capsys, mistake, sentence) -> None:
    status, _ = run(*(word.format(network=network) for word in mistake))

    assert status == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert "Traceback" not in message
