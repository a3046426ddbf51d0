"""jobs/prune.py as a user calls it: a pruned network, what is kept of it, and what follows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file, save_file

from medspark.models.card import read_card
from medspark.models.checkpoint import load_classifier
from medspark.models.masks import prunable, zero_share
from medspark.train.config import TrainConfig
from medspark.train.prune.config import PruneConfig
from medspark.workflows.prune import PruneAtConfig, training_of


@pytest.fixture(scope="module")
def job(load_job: Callable[[str], ModuleType]) -> ModuleType:
    return load_job("prune")


QUICK = [
    *("--train.epochs", "2", "--train.batch_size", "8", "--train.validation_steps", "1"),
    *("--train.monitor.action", "off", "--evaluate.steps", "1", "--evaluate.sanity_images", "4"),
    *("--launch.processes", "1", "--track.system_metrics", "false"),
]


@pytest.mark.spark
@pytest.mark.ddp
@pytest.mark.slow
def test_a_model_is_pruned_judged_with_its_noise_and_tracked(
    spark, job: ModuleType, network: Path, write_shards: Callable[..., Path], tmp_path: Path, capsys
) -> None:
    store, output = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "result.json"
    data = ["--shards", str(write_shards(rows=16, side=32)), "--model", str(network)]

    status = job.main(
        [*data, *QUICK, "--sparsity", "0.9", "--track.uri", store, "--output", str(output)]
    )

    said = capsys.readouterr().out
    assert status == 0
    assert "pruned (rsr) |" in said
    assert "| with noise |" in said
    assert "90.0 % of the weights are zero" in said
    result = json.loads(output.read_text())
    assert (result["job"], result["mode"], result["steps"]) == ("prune", "rsr", 4)
    folder = Path(result["model"])
    assert zero_share(prunable(load_classifier(folder))) == result["sparsity"] >= 0.899
    assert read_card(folder).kind == "pruned"
    assert "| without noise |" in (folder.parent / "report" / "robustness.md").read_text()
    run = MlflowClient(store).get_run(result["mlflow"]["run_id"])
    assert run.data.params["prune.method"] == "rsr"
    assert run.data.metrics["sparsity"] == pytest.approx(result["sparsity"])
    assert run.data.metrics["noise/eot"] == pytest.approx(result["noise"]["eot"])


@pytest.fixture
def normless(network: Path) -> Path:
    """A model folder whose weights are all of norms."""
    path = network / "model.safetensors"
    tensors = load_file(path)
    save_file({name: t.flatten()[:1].clone() for name, t in tensors.items() if t.ndim}, path)
    return network


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--shards {shards}", "model is needed: give --model."),
        ("--model /nowhere --shards {shards}", "'/nowhere' is not a medspark model"),
        ("--model {model} --shards /nowhere", "/nowhere"),
        ("--model {model} --shards {shards} --sparsity 1", "sparsity cannot be '1'"),
        ("--model {model} --shards {shards} --sparsity -0.1", "sparsity cannot be '-0.1'"),
        ("--model {model} --shards {shards} --method snip", "method cannot be 'snip'"),
        (
            "--model {model} --shards {shards} --method rsr --structured",
            "structured removes channels by magnitude: method cannot be rsr",
        ),
        ("--model {model} --shards {findings}", "does not fit: it predicts one of a, b"),
        (
            "--model {model} --shards {shards} --train.monitor.action restore",
            "train.monitor.action restore could end the training before the network is pruned",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2_before_spark_starts(
    job: ModuleType,
    network: Path,
    write_shards,
    argv: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch,
    capsys,
) -> None:
    monkeypatch.chdir(tmp_path)
    shards = write_shards(rows=8, side=32, findings=3 if "{findings}" in argv else 0)

    status = job.main(argv.format(model=network, shards=shards, findings=shards).split())

    said = capsys.readouterr().err.strip()
    assert status == 2
    assert said.startswith("prune: ")
    assert sentence in said
    assert "\n" not in said


@pytest.mark.usefixtures("no_session")
def test_a_model_with_nothing_to_prune_is_one_sentence(
    job: ModuleType, normless: Path, write_shards, tmp_path: Path, capsys
) -> None:
    shards = write_shards(rows=8, side=32)

    status = job.main(["--model", str(normless), "--shards", str(shards)])

    assert status == 2
    assert "has no convolution or linear layer to prune" in capsys.readouterr().err


@pytest.mark.usefixtures("no_session")
def test_without_its_package_structured_pruning_names_the_extra(
    job: ModuleType, network: Path, write_shards, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("medspark.train.prune.config.find_spec", lambda name: None)
    shards = str(write_shards(rows=8, side=32))

    status = job.main(
        ["--model", str(network), "--shards", shards, "--method", "magnitude", "--structured"]
    )

    assert status == 2
    assert "pip install 'medspark[prune]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("architecture", "given", "rate"),
    [
        ("test_resnet", {}, 1e-3),
        ("test_resnet", {"lr": 3e-4}, 3e-4),
        ("vit_tiny_patch16_224", {"epochs": 2}, 3e-4),
    ],
)
def test_pruning_learns_at_a_higher_rate_unless_one_is_given_or_the_network_needs_its_own(
    architecture: str, given: dict[str, float], rate: float, network: Path
) -> None:
    card = network / "model.json"
    card.write_text(card.read_text().replace("test_resnet", architecture))
    settings = PruneAtConfig(model=network, shards=network, train=TrainConfig.model_validate(given))

    training = training_of(settings, network, PruneConfig())

    assert training.train.lr == rate
    assert training.train.epochs == given.get("epochs", 6)
