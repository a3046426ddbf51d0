"""The federation's job as a user meets it: its result, mistakes, faults of clients, and kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import array_shards
import numpy as np
import pytest
from mlflow import MlflowClient
from safetensors.numpy import load_file

from medspark.federate.client import train_client
from medspark.federate.setting import Setting
from medspark.workflows import federate as workflow
from medspark.workflows import federation

ROOT = Path(__file__).parents[2]
SITES, IMAGES = ("mercy", "north", "south"), (21, 7, 14)
TINY = (
    *("--model.name", "test_resnet", "--batch_size", 8, "--rounds", 2),
    *("--optimiser", "sgd", "--lr", 0.05, "--schedule", "constant"),
    *("--evaluate.attacks", "pgd", "--evaluate.steps", 1, "--evaluate.eps", "2/255"),
    *("--evaluate.sanity_images", 0, "--validate_rounds.images", 8, "--validate_rounds.steps", 1),
    *("--track.system_metrics", "false", "--tasks", 2),
)
BY_SITE = ("--clients.by", "site")

Run = Callable[..., tuple[int, dict[str, Any]]]


def write(folder: Path, *, sites: bool = True, validation: int = 8) -> Path:
    """Write shards of two classes that differ in a bright square, from three unequal sites."""
    draw = np.random.default_rng(0)
    splits, places = {}, {}
    for split, count in (("train", 42), ("val", validation), ("test", 18)):
        labels = np.arange(count) % 2
        pixels = draw.integers(50, 150, (count, 16, 16, 1))
        pixels[:, 4:10, 4:10] += 90 * labels[:, None, None, None]
        splits[split] = pixels.astype(np.uint8), labels
        # The third site has no test image.
        counts = IMAGES if split == "train" else (count // 2, count // 2, 0)
        places[split] = np.repeat(SITES, counts).tolist()
    return array_shards.write_arrays(folder, splits, shards=2, sites=places if sites else None)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("federation") / "shards")


def command(shards: Path, place: Path, *more: object) -> list[str]:
    own = ("--shards", shards, "--run_dir", place / "run", "--output", place / "result.json",
           "--track.uri", f"sqlite:///{place}/mlflow.db")  # fmt: skip
    words: dict[str, list[str]] = {}
    for word in map(str, (*TINY, *own, *more)):
        if word.startswith("--"):
            key = word
            words[key] = []  # a later one replaces an earlier one
        else:
            words[key].append(word)
    return [word for key, values in words.items() for word in (key, *values)]


@pytest.fixture(scope="module")
def job(load_job: Callable[[str], ModuleType]) -> ModuleType:
    return load_job("federate")


@pytest.fixture(scope="module")
def run(spark: Any, job: ModuleType, shards: Path) -> Run:
    """Return a function that runs the job on two Spark tasks."""

    def start(place: Path, *more: object) -> tuple[int, dict[str, Any]]:
        status = job.main(command(shards, place, *more))
        return status, json.loads((place / "result.json").read_text()) if status == 0 else {}

    return start


def client_of(result: dict[str, Any]) -> MlflowClient:
    return MlflowClient(result["mlflow"]["uri"])


# --- from shards to the result ---


@pytest.fixture(scope="module")
def by_site(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    status, result = run(tmp_path_factory.mktemp("site"), *BY_SITE)
    assert status == 0
    return result


@pytest.mark.spark
@pytest.mark.slow
def test_the_result_has_every_round_and_the_robustness_of_the_network(by_site: dict[str, Any]):
    assert (by_site["clients"], by_site["train_images"], by_site["tasks"]) == (3, 42, 2)
    assert by_site["aggregate"] == "fedavg"
    assert by_site["clean"]["accuracy"] is not None
    assert [attack["name"] for attack in by_site["attacks"]] == ["pgd"]
    assert [each["round"] for each in by_site["rounds"]] == [0, 1]
    for each in by_site["rounds"]:
        assert each["clients"] == [0, 1, 2]
        assert each["left_out"] == {}
        assert each["clean"]["accuracy"] is not None
        assert each["attacks"][0]["name"] == "pgd"
        assert each["bytes_up"] == each["bytes_down"] > 3 * 4 * 100_000
        assert each["seconds"] > 0


@pytest.mark.spark
@pytest.mark.slow
def test_every_site_has_its_figures_on_its_own_test_images(by_site: dict[str, Any]):
    found = [(each["client"], each["site"], each["images"]) for each in by_site["per_client"]]

    assert found == [(0, "mercy", 9), (1, "north", 9)]
    whole = sum(9 * each["clean"]["accuracy"] for each in by_site["per_client"]) / 18
    assert by_site["clean"]["accuracy"] == pytest.approx(whole)


@pytest.mark.spark
@pytest.mark.slow
def test_the_report_shows_rounds_and_sites(by_site: dict[str, Any]):
    folder = Path(by_site["report"]).parent

    assert "Test images of the client's site." in (folder / "report.md").read_text()
    assert {path.name for path in folder.iterdir()} >= {
        "report.html", "report.md", "rounds.csv", "rounds.png",
    }  # fmt: skip
    assert "| mercy | 9 |" in (folder / "report.md").read_text()
    assert len((folder / "rounds.csv").read_text().splitlines()) == 3


@pytest.mark.spark
@pytest.mark.slow
def test_the_run_in_mlflow_has_a_step_for_each_round_and_the_model(by_site: dict[str, Any]):
    client, run_id = client_of(by_site), by_site["mlflow"]["run_id"]

    kept = client.get_run(run_id)
    steps = [each.step for each in client.get_metric_history(run_id, "loss")]
    assert kept.info.status == "FINISHED"
    assert steps == [1, 2]
    assert {"val/accuracy", "val/pgd_accuracy", "change_norm"} <= set(kept.data.metrics)
    assert kept.data.params["clients.by"] == "site"
    assert kept.data.params["spark_tasks"] == "2"
    assert any(path.path == "rounds.png" for path in client.list_artifacts(run_id))
    assert by_site["mlflow"]["model"]


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.parametrize("policy", ["local", "reestimate"])
def test_batch_norms_of_clients_come_to_a_network_that_can_be_tested(
    run: Run, tmp_path: Path, policy: str
):
    more = ("--batch_norm", policy, "--clients.by", "dirichlet", "--clients.count", 3)
    status, result = run(tmp_path, *more)

    assert status == 0
    assert result["batch_norm"] == policy
    model = load_file(Path(result["model"]) / "model.safetensors")
    means = [v for name, v in model.items() if name.endswith("running_mean")]
    assert any(np.abs(mean).max() > 0 for mean in means)
    assert sum(each["images"] for each in result["per_client"]) == 18
    assert {each["own_network"] for each in result["per_client"]} == {policy == "local"}
    assert all("site" not in each or each["site"] is None for each in result["per_client"])


# --- mistakes ---


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--aggregate mean", "aggregate: there is no rule 'mean'"),
        ("--rule.bound 2", "rule.bound of fedavg: extra inputs are not permitted"),
        ("--aggregate krum --rule.adversaries many", "rule.adversaries of krum: input should be"),
        ("--privacy.rate 0.2 --aggregate median", "privacy has its own aggregation rule"),
        ("--clients.by dirichlet", "clients.by dirichlet needs clients.count"),
        (
            "--decision.youden true --decision.positive x",
            "decision.positive: there is no class 'x'",
        ),
        ("--clients.by site --clients.count 3", "clients.by site takes no clients.count"),
        ("--model.name test_resnot", "model.name: timm has no model 'test_resnot'"),
        ("--overwrite --resume auto", "overwrite begins a run anew and resume auto goes on"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2_before_spark_starts(
    job: ModuleType, shards: Path, tmp_path: Path, more: str, sentence: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("Spark was started")

    monkeypatch.setattr(workflow, "spark_session", too_late)

    status = job.main(command(shards, tmp_path, *more.split()))

    said = capsys.readouterr().err.strip()
    assert (status, len(said.splitlines())) == (2, 1), said
    assert said.startswith("federate: ")
    assert sentence in said


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--clients.by site", "These shards name no sites: shard again"),
        ("--clients.count 500", "clients.count 500 is more than the 42 patients"),
        ("--clients.per_round 43", "clients.per_round 43 is more than the 42 clients"),
        ("--clients.per_round 2 --clients.least 3", "clients.least 3 is more than the 2 clients"),
        ("--clients.count 4 --aggregate krum", "Krum needs at least 5 clients in a round"),
        ("--aggregate fltrust", "fltrust trains on validation images"),
        ("--batch_norm reestimate", "batch_norm reestimate computes statistics from validation"),
        ("--evaluate.attacks transfer", "attacks: "),
        ("--adversary.name badnets --adversary.badnets.target 9", "adversary.badnets.target"),
        (
            "--adversary.name badnets --adversary.clients 99",
            "adversary.clients: there is no client",
        ),
        ("--adversary.name edge_case --adversary.edge nowhere", "adversary.edge: there is no"),
    ],
)
def test_what_does_not_fit_the_shards_is_said_before_spark_starts_and_leaves_no_run(
    job: ModuleType, tmp_path: Path, more: str, sentence: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bare = write(tmp_path / "shards", sites=False, validation=0)
    monkeypatch.setattr(workflow, "spark_session", None)

    status = job.main(command(bare, tmp_path, *more.split()))

    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("federate: ")]
    assert (status, len(said)) == (2, 1)
    assert said[0].startswith(f"federate: {sentence}")
    left = {
        path.name for path in tmp_path.rglob("*") if path.is_file() and bare not in path.parents
    }
    assert left <= {".medspark.json", ".lock"}


@pytest.mark.spark
def test_more_tasks_than_spark_has_are_refused_before_a_run_begins(
    spark: Any, job: ModuleType, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = job.main(command(shards, tmp_path, "--tasks", 3))

    assert (status, (tmp_path / "mlflow.db").exists()) == (2, False)
    assert "federate: tasks is 3, but Spark has 2 slots" in capsys.readouterr().err


def test_help_is_told_without_torch_or_mlflow():
    code = (
        "import sys; from medspark.jobs.federate import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'mlflow', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "[]"
    for key in ("--clients.by", "--rule", "--privacy.rate", "--adversary.name", "--batch_norm"):
        assert key in done.stdout


# --- clients that fail ---


@pytest.mark.spark
@pytest.mark.slow
def test_a_client_that_hangs_and_one_that_kills_its_worker_are_left_out_and_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def train(network: Any, rows: Any, task: Any, *more: Any, **given: Any) -> Any:
        if len(rows) == IMAGES[0]:
            time.sleep(600)
        if len(rows) == IMAGES[1]:
            os._exit(1)
        return train_client(network, rows, task, *more, **given)

    monkeypatch.setattr(federation, "Setting", lambda *given: Setting(*given, train=train))

    status, result = run(tmp_path, *BY_SITE, "--clients.deadline", 6, "--rounds", 1)

    assert status == 0
    (only,) = result["rounds"]
    assert only["clients"] == [2]
    assert only["left_out"] == {
        "0": "it had not answered after 6 s",
        "1": "its task died 2 times while training it",
    }


# --- kills ---


@pytest.mark.spark
@pytest.mark.slow
def test_a_killed_federation_goes_on_in_its_run_to_the_same_weights(
    run: Run, shards: Path, tmp_path: Path
):
    more = (*BY_SITE, "--rounds", 4, "--aggregate", "fedadam", "--resume", "auto",
            "--validate_rounds.every", 0)  # fmt: skip
    words = command(shards, tmp_path, *more, "--spark.master", "local[2]")
    job = subprocess.Popen(
        [sys.executable, ROOT / "jobs" / "federate.py", *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    second = tmp_path / "run" / "round-00001" / "result.json"
    while not second.exists():
        assert job.poll() is None, "the federation ended"
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    written = second.stat().st_mtime_ns

    status, result = run(tmp_path, *more)

    _, whole = run(tmp_path / "whole", *more)
    assert status == 0
    runs = client_of(result).search_runs(["1"], "")
    assert [each.info.run_id for each in runs] == [result["mlflow"]["run_id"]]
    assert second.stat().st_mtime_ns == written
    assert same_network(result, whole)
    history = client_of(result).get_metric_history(result["mlflow"]["run_id"], "loss")
    assert sorted({each.step for each in history}) == [1, 2, 3, 4]


def same_network(one: dict[str, Any], other: dict[str, Any]) -> bool:
    first, second = (load_file(Path(r["model"]) / "model.safetensors") for r in (one, other))
    return first.keys() == second.keys() and all(
        np.array_equal(first[name], second[name]) for name in first
    )


@pytest.mark.spark
@pytest.mark.slow
def test_a_finished_federation_is_returned_and_another_one_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    _, first = run(tmp_path, *BY_SITE, "--rounds", 1)
    again, second = run(tmp_path, *BY_SITE, "--rounds", 1, "--resume", "auto")
    assert (again, second["mlflow"]) == (0, first["mlflow"])
    (tmp_path / "run" / "finished.json").unlink()

    status, _ = run(tmp_path, *BY_SITE, "--rounds", 1, "--lr", 0.5, "--resume", "auto")
    assert status == 2
    assert "another configuration" in capsys.readouterr().err

    status, _ = run(tmp_path, *BY_SITE, "--rounds", 1)
    assert status == 2
    assert "--resume auto" in capsys.readouterr().err


@pytest.mark.spark
@pytest.mark.slow
def test_a_finished_federation_gets_a_decision_without_training_again(run: Run, tmp_path: Path):
    _, first = run(tmp_path, *BY_SITE, "--rounds", 1)

    decided = ("--resume", "auto", "--decision.youden", "true", "--decision.positive", "a")
    status, second = run(tmp_path, *BY_SITE, "--rounds", 1, *decided)

    assert status == 0
    assert same_network(first, second)
    assert "decision" not in first
    assert (second["decision"]["positive"], second["decision"]["criterion"]) == ("a", "youden")
    assert {"sensitivity", "specificity"} <= second["clean"]["intervals"].keys()
    counts = [second["decision"][name]["images"] for name in ("sensitivity", "specificity")]
    assert counts == [4, 4]  # the validation images
