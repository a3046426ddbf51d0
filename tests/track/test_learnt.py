"""Which runs read which data, found again in a real MLflow store."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from medspark.errors import RunError
from medspark.track.config import TrackConfig
from medspark.track.learnt import runs_with_data
from medspark.track.runs import tracked
from medspark.track.spool import DatasetEntry, RunEntry


def test_every_run_names_its_data_and_its_registered_models(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    quiet = TrackConfig(uri=store, system_metrics=False, patience_seconds=0)
    entry = RunEntry(name="one", config={}, params={}, tags={})
    data = DatasetEntry(name="shards", digest="ab" * 32, source="/data/shards")
    with tracked(tmp_path / "with", quiet, entry.model_copy(update={"dataset": data})) as run:
        run.end("FINISHED")
    with tracked(tmp_path / "without", quiet, entry) as other:
        other.end("FINISHED")
    client, run_id = MlflowClient(store), run.reference["run_id"]
    client.create_registered_model("chest")
    client.create_model_version("chest", "/somewhere", run_id)

    (found,) = runs_with_data(store)

    assert (found.run_id, found.name) == (run_id, "one")
    assert (found.digest, found.source) == ("ab" * 32, "/data/shards")
    assert found.models == ("chest version 1",)


def test_a_store_that_does_not_answer_is_said_in_one_line() -> None:
    with pytest.raises(RunError) as raised:
        runs_with_data("http://127.0.0.1:9")

    assert "\n" not in str(raised.value)
