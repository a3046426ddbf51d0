"""One MLflow run per training: live, complete, resumable, and never in the way of training."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from tensors import same_tensors

from medspark.errors import UsageError
from medspark.models.backbones import build
from medspark.models.checkpoint import describe, load_classifier, save_classifier
from medspark.models.config import ModelConfig
from medspark.track.__main__ import main as publish_later
from medspark.track.config import TrackConfig
from medspark.track.journal import Journal
from medspark.track.models import fetch_model
from medspark.track.runs import TrackedRun, tracked
from medspark.track.spool import DatasetEntry, ModelEntry, RunEntry, Spool, read_state

ENTRY = RunEntry(
    name="mobilenetv2",
    config={"train": {"epochs": 2, "mode": "fused"}, "data": {"reader": "native"}},
    params={"world_size": 2},
    tags={"medspark.job": "train_at"},
    dataset=DatasetEntry(name="shards", digest="ab" * 32, source="/data/shards"),
)
QUIET = {"system_metrics": False, "patience_seconds": 0}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlruns') / 'mlflow.db'}"


@pytest.fixture
def dead_server() -> str:
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.server_close()
    return f"http://127.0.0.1:{server.server_port}"


def _history(store: str, run_id: str | None, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in MlflowClient(store).get_metric_history(run_id, key)]


def test_a_run_holds_configuration_dataset_metrics_and_files(tmp_path: Path, store: str) -> None:
    artifacts = tmp_path / "report"
    artifacts.mkdir()
    (artifacts / "robustness.md").write_text("| eps |")

    with tracked(tmp_path / "run", TrackConfig(uri=store, **QUIET), ENTRY) as run:
        with Journal(run.spool.journal, flush_seconds=0) as journal:
            for step in range(3):
                journal.record(step, {"loss": 1.0 / (step + 1)})
        run.end("FINISHED", summary={"test/clean/auroc": 0.95}, artifacts=artifacts)

    logged = MlflowClient(store).get_run(run.reference["run_id"])
    assert logged.info.status == "FINISHED"
    assert logged.data.params["train.epochs"] == "2"
    assert logged.data.params["world_size"] == "2"
    assert logged.data.metrics["test/clean/auroc"] == 0.95
    assert logged.inputs.dataset_inputs[0].dataset.digest == ("ab" * 32)[:36]
    assert logged.data.tags["medspark.dataset_digest"] == "ab" * 32
    assert [step for step, _ in _history(store, run.reference["run_id"], "loss")] == [0, 1, 2]
    files = {f.path for f in MlflowClient(store).list_artifacts(run.reference["run_id"])}
    assert {"config.yaml", "robustness.md"} <= files


def test_mlflow_keeps_the_versions_of_the_process_that_ran(tmp_path: Path, store: str) -> None:
    with tracked(tmp_path / "run", TrackConfig(uri=store, **QUIET), ENTRY) as run:
        run.end("FINISHED")

    mlflow.set_tracking_uri(store)
    uri = f"runs:/{run.reference['run_id']}/versions.json"
    kept = mlflow.artifacts.load_dict(uri)
    assert kept["python"]["version"] == platform.python_version()
    assert kept["torch"]["version"] == importlib.metadata.version("torch")


def test_metrics_arrive_while_training_runs(tmp_path: Path, store: str) -> None:
    with tracked(tmp_path / "run", TrackConfig(uri=store, **QUIET), ENTRY) as run:
        Journal(run.spool.journal, flush_seconds=0).record(7, {"loss": 0.5})
        assert run.publish()
        assert _history(store, run.reference["run_id"], "loss") == [(7, 0.5)]
        run.end("FINISHED")


def test_a_resumed_run_keeps_its_id_and_reports_no_step_twice(tmp_path: Path, store: str) -> None:
    config = TrackConfig(uri=store, **QUIET)
    with pytest.raises(ZeroDivisionError), tracked(tmp_path / "run", config, ENTRY) as crashed:
        with Journal(crashed.spool.journal) as journal:
            for step in range(4):
                journal.record(step, {"loss": float(step)})
        raise ZeroDivisionError

    with tracked(tmp_path / "run", config, ENTRY) as resumed:
        with Journal(resumed.spool.journal) as journal:
            for step in range(2, 6):
                journal.record(step, {"loss": float(step)})
        resumed.end("FINISHED")

    assert resumed.reference["run_id"] == crashed.reference["run_id"]
    history = _history(store, resumed.reference["run_id"], "loss")
    assert history == [(step, float(step)) for step in range(6)]
    assert MlflowClient(store).get_run(resumed.reference["run_id"]).info.status == "FINISHED"


def test_a_process_killed_before_it_wrote_the_id_of_its_run_finds_the_run_again(
    tmp_path: Path, store: str
) -> None:
    config = TrackConfig(uri=store, experiment="killed", system_metrics=False)
    with tracked(tmp_path, config, RunEntry(name="killed")) as run:
        first = run.reference["run_id"]
        run.end("FINISHED")
    Spool.reopen(tmp_path, uri=store).update(run_id=None, described=False)

    with tracked(tmp_path, config, RunEntry(name="killed")) as run:
        again = run.reference["run_id"]
        run.end("FINISHED")

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("killed")
    assert experiment is not None
    assert again == first
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_a_run_that_raises_is_marked_as_failed(tmp_path: Path, store: str) -> None:
    config = TrackConfig(uri=store, **QUIET)
    with pytest.raises(ZeroDivisionError), tracked(tmp_path / "run", config, ENTRY) as run:
        raise ZeroDivisionError

    assert MlflowClient(store).get_run(run.reference["run_id"]).info.status == "FAILED"


def test_a_server_that_is_down_costs_nothing_but_a_later_publish(
    tmp_path: Path, store: str, dead_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    with tracked(tmp_path / "run", TrackConfig(uri=dead_server, **QUIET), ENTRY) as run:
        with Journal(run.spool.journal) as journal:
            for step in range(50):
                journal.record(step, {"loss": float(step)})
        run.end("FINISHED", patience_seconds=0)
    assert run.reference["run_id"] is None
    assert f"python -m medspark.track --uri {dead_server} {tmp_path / 'run'}" in caplog.text

    assert publish_later(["--uri", store, str(tmp_path / "run")]) == 0

    run_id = read_state(tmp_path / "run").run_id
    assert len(_history(store, run_id, "loss")) == 50


def test_training_does_not_wait_for_a_server_that_is_slow_to_answer(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with tracked(tmp_path / "run", TrackConfig(uri=uri, **QUIET), ENTRY) as run:
            trained_after = time.monotonic() - began
            silent.close()
            run.end("FINISHED", patience_seconds=0)

    assert trained_after < 8  # MLflow gives up after 10 s
    assert run.reference["run_id"] is None


def test_a_store_that_cannot_be_opened_costs_no_training(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/missing/mlflow.db"
    (tmp_path / "missing").write_text("a file where a folder should be")

    with tracked(tmp_path / "run", TrackConfig(uri=uri, **QUIET), ENTRY) as run:
        run.end("FINISHED", patience_seconds=0)

    assert run.reference["run_id"] is None
    assert read_state(tmp_path / "run").ending is not None


def test_publishing_a_folder_without_a_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish_later([str(tmp_path)]) == 1
    assert "no recorded run" in capsys.readouterr().err


@pytest.mark.slow
def test_the_model_comes_back_by_every_name_as_pyfunc_and_as_a_torch_module(
    tmp_path: Path, store: str
) -> None:
    model = build(ModelConfig(name="mobilenetv2_050"), num_classes=2, channels=1)
    card = describe(model, classes=("normal", "pneumonia"), height=32, width=32)
    save_classifier(tmp_path / "model", model, card)
    entry = ModelEntry(
        folder=tmp_path / "model",
        loader="medspark.models.predictor:Predictor.load",
        input_shape=(32, 32, 1),
        outputs=2,
    )

    with tracked(tmp_path / "run", TrackConfig(uri=store, **QUIET), ENTRY) as run:
        run.end("FINISHED", model=entry)

    uri = run.reference["model"]
    assert uri is not None
    client = MlflowClient(store, registry_uri=store)
    client.create_registered_model("net")
    client.create_model_version("net", uri)
    client.set_registered_model_alias("net", "best", "1")
    mlflow.set_tracking_uri("sqlite://")  # not the store in question
    fetched = fetch_model(uri, uri=store)
    others = ("models:/net/1", "models:/net@best", f"runs:/{run.reference['run_id']}/model")
    assert [fetch_model(other, uri=store) for other in others] == [fetched] * 3
    mlflow.set_tracking_uri(store)
    served = mlflow.pyfunc.load_model(uri)
    images = np.random.default_rng(0).random((3, 32, 32, 1), dtype=np.float32)
    assert served.predict(images).shape == (3, 2)
    assert served.metadata.signature.inputs.inputs[0].shape == (-1, 32, 32, 1)
    assert same_tensors(load_classifier(fetched), model)
    logged = fetched.parents[1]
    assert not [path for path in logged.rglob("*") if path.suffix in {".pkl", ".pt2", ".pth"}]


def test_publishing_in_the_background_ends_with_the_run(tmp_path: Path, store: str) -> None:
    with tracked(tmp_path / "run", TrackConfig(uri=store, **QUIET), ENTRY) as run:
        run.end("FINISHED")

    assert "mlflow" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(
    "model_uri",
    [
        "models:/m-zzz",
        "models:/nope/1",
        "models:/nope@best",
        "models:/nope/latest",
        "runs:/zzz/net",
    ],
)
def test_a_model_that_the_store_has_not_is_named_in_one_sentence(
    store: str, model_uri: str
) -> None:
    with pytest.raises(UsageError) as told:
        fetch_model(model_uri, uri=store)

    sentence = str(told.value)
    assert sentence.startswith(f"The model {model_uri} cannot be had from MLflow at {store}: ")
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_a_store_that_does_not_answer_is_named(dead_server: str) -> None:
    with pytest.raises(UsageError, match=f"from MLflow at {dead_server}: API request"):
        fetch_model("models:/net/1", uri=dead_server)


def test_mlflow_is_left_alone_until_training_has_a_record(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, asked = TrackedRun.publish, threading.Event()

    def noted(run: TrackedRun) -> bool:
        asked.set()
        return publish(run)

    monkeypatch.setattr(TrackedRun, "publish", noted)
    config = TrackConfig(uri=store, **QUIET)
    with tracked(tmp_path, config, ENTRY, after_first_record=True) as run:
        assert not asked.wait(1)
        with Journal(run.spool.journal) as journal:
            journal.record(1, {"loss": 0.5})
        assert run.reference["run_id"]
        run.end("FINISHED")


def test_a_run_that_ends_without_a_record_is_in_mlflow_at_once(tmp_path: Path, store: str) -> None:
    begun = time.monotonic()
    with tracked(tmp_path, TrackConfig(uri=store, **QUIET), ENTRY, after_first_record=True) as run:
        run.end("FAILED")

    assert run.reference["run_id"]
    assert time.monotonic() - begun < 30
