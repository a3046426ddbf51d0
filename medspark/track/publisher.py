"""Publish the spool of a run to MLflow, continuing after the last published item."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import yaml
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient

from medspark.track.journal import JournalReader, Record
from medspark.track.learnt import DIGEST_TAG
from medspark.track.local_store import open_store
from medspark.track.models import log_model, register_model
from medspark.track.run_list import describe_experiment
from medspark.track.spool import DatasetEntry, ModelEntry, Spool
from medspark.track.store import quieten

__all__ = ["Publisher"]

# MLflow's limits for one request (mlflow/utils/validation.py).
_METRICS_PER_BATCH, _PARAMS_PER_BATCH, _PARAM_LENGTH, _DIGEST_LENGTH = 1000, 100, 6000, 36
_TAG_LENGTH = 8000
_SPOOL_TAG = "medspark.spool"


class Publisher:
    """Publishes one spool to its MLflow run, and tracks which parts MLflow already has."""

    def __init__(self, spool: Spool) -> None:
        """Open the store. A new local store takes seconds to create its tables."""
        quieten()  # MLflow sets up its loggers when it is imported
        self.spool = spool
        self._client = open_store(spool.uri)
        self._reader = JournalReader(spool.journal)
        self._pending: list[Metric] = []
        self._counted = dict(spool.state.published)

    def publish(self) -> None:
        """Send everything that MLflow does not have yet.

        Raises RunError, and sends nothing, if files lie outside the run's folder, and the store's
        own exceptions if it is unreachable.
        """
        self.spool.check()
        self._create()
        self._describe()
        self._publish_metrics()
        self._finish()

    def charts(self, order_by: str) -> str:
        """Return the URL of the children's charts, relative to the server's."""
        experiment = self._client.get_run(self._run_id).info.experiment_id
        query = {
            "compareRunsMode": "CHART",
            "orderByKey": f"metrics.`{order_by}`",
            "orderByAsc": "false",
            "searchFilter": f"tags.mlflow.parentRunId = '{self._run_id}'",
        }
        return f"#/experiments/{experiment}/runs?{urlencode(query, quote_via=quote)}"

    @contextmanager
    def watching_machine(self) -> Iterator[None]:
        """Record processor and memory use in MLflow while the block runs."""
        state = self.spool.state
        monitor = SystemMetricsMonitor(  # type: ignore[no-untyped-call]
            self._run_id,
            # With the default of 10 s, a short run would have no samples.
            sampling_interval=2,
            samples_before_logging=2,
            resume_logging=bool(state.published),
            node_id="driver",
            tracking_uri=self.spool.uri,
        )
        monitor.start()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            monitor.finish()  # type: ignore[no-untyped-call]

    @property
    def _run_id(self) -> str:
        run_id = self.spool.state.run_id
        assert run_id is not None, "the run has been created"
        return run_id

    def _create(self) -> None:
        state = self.spool.state
        if state.run_id is not None:
            return
        experiment = _experiment_id(self._client, state.experiment, self.spool.uri)
        with suppress(MlflowException):  # a user may be allowed to add runs but not tags
            describe_experiment(self._client, experiment)
        tags = {"mlflow.source.name": "medspark"} | state.entry.tags
        if state.parent_run_id:
            tags["mlflow.parentRunId"] = state.parent_run_id
        run = self._created_before(experiment)
        if run is None:
            # The id is on disk before the run is made: a process that is killed right after
            # create_run finds its run again.
            self.spool.update(spool_id=uuid.uuid4().hex)
            tags[_SPOOL_TAG] = self.spool.state.spool_id
            run = self._client.create_run(experiment, tags=tags, run_name=state.entry.name)
        self.spool.update(run_id=run.info.run_id)

    def _created_before(self, experiment: str) -> Run | None:
        """Return the run that an earlier process made without writing down its id."""
        spool_id = self.spool.state.spool_id
        if not spool_id:
            return None
        found = self._client.search_runs([experiment], f"tags.`{_SPOOL_TAG}` = '{spool_id}'")
        return found[0] if found else None

    def _describe(self) -> None:
        if self.spool.state.described:
            return
        entry = self.spool.state.entry
        values = entry.params | dict(_leaves(entry.config)) | entry.params  # those first
        params = [Param(key, str(value)[:_PARAM_LENGTH]) for key, value in values.items()]
        for start in range(0, len(params), _PARAMS_PER_BATCH):
            self._client.log_batch(self._run_id, params=params[start : start + _PARAMS_PER_BATCH])
        if entry.dataset is not None:
            self._client.log_inputs(self._run_id, [_dataset_input(entry.dataset)])
            self._client.set_tag(self._run_id, DIGEST_TAG, entry.dataset.digest)
        document = yaml.safe_dump(entry.config, sort_keys=False, allow_unicode=True)
        self._client.log_text(self._run_id, document, "config.yaml")
        self._client.log_dict(self._run_id, entry.versions, "versions.json")
        self.spool.update(described=True)

    def _publish_metrics(self) -> None:
        for record in self._reader.poll():
            self._pending += _new_metrics(record, self._counted)
        while self._pending:
            batch = self._pending[:_METRICS_PER_BATCH]
            self._client.log_batch(self._run_id, metrics=batch)
            del self._pending[: len(batch)]
            last = {metric.key: metric.step for metric in batch}
            self.spool.update(published=self.spool.state.published | last)

    def _finish(self) -> None:
        ending = self.spool.state.ending
        if ending is None or self.spool.state.complete:
            return
        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, 0) for key, value in ending.summary.items()]
        params = [Param(key, str(value)) for key, value in ending.params.items()]
        self._client.log_batch(self._run_id, metrics=metrics, params=params)
        for key, value in ending.tags.items():
            self._client.set_tag(self._run_id, key, value[:_TAG_LENGTH])
        if ending.artifacts is not None and (self.spool.folder / ending.artifacts).is_dir():
            self._client.log_artifacts(self._run_id, str(self.spool.own(ending.artifacts)))
        if ending.model is not None:
            self._publish_model(ending.model)
        self._client.set_terminated(self._run_id, ending.status)
        self.spool.update(complete=True)

    def _publish_model(self, model: ModelEntry) -> None:
        model = model.model_copy(update={"folder": self.spool.own(model.folder)})
        where = {"run_id": self._run_id, "uri": self.spool.uri}
        if self.spool.state.model_uri is None:
            self.spool.update(model_uri=log_model(model, **where))
        if model.register_as and not self.spool.state.registered:
            self.spool.update(registered=register_model(model, model.register_as, **where))


def _experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        location = None
        if uri.startswith("sqlite:///"):
            store = Path(uri.removeprefix("sqlite:///")).resolve().parent
            # Keep artifacts below the store, even for names like ../x or /Shared/x.
            location = (store / "artifacts" / re.sub(r"[^\w -]", "_", name)).as_uri()
        # Creation fails if another driver creates it at the same moment; then look it up again.
        with suppress(MlflowException):
            return str(client.create_experiment(name, artifact_location=location))
        found = client.get_experiment_by_name(name)
    if found is None:
        raise MlflowException(f"the experiment {name} cannot be created")
    return str(found.experiment_id)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _new_metrics(record: Record, counted: dict[str, int]) -> list[Metric]:
    """Return the metrics of ``record`` with steps after ``counted``, and update ``counted``.

    A resumed run repeats the steps since its checkpoint; they are reported once.
    """
    fresh = []
    for key, value in record.metrics.items():
        if record.step > counted.get(key, -1):
            counted[key] = record.step
            fresh.append(Metric(key, value, record.time_ms, record.step))
    return fresh


def _dataset_input(dataset: DatasetEntry) -> DatasetInput:
    entity = Dataset(
        name=dataset.name,
        digest=dataset.digest[:_DIGEST_LENGTH],
        source_type="local",
        source=json.dumps({"uri": dataset.source}),
    )
    return DatasetInput(dataset=entity, tags=[InputTag("mlflow.data.context", "training")])
