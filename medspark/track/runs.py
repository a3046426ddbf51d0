"""One MLflow run per training: kept in a folder first, published from there as far as one can.

The folder (a *spool*) is the truth: what the run is, its journal, how it ended. ``publish`` brings
MLflow up to date with it, live while training runs, again after a tracking server was away, or
days later (``python -m medspark.track FOLDER``). So a server that is down costs no training step
and no metric, and a resumed run goes on under the run id that its spool holds.
"""

from __future__ import annotations

import functools
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import mlflow
import yaml
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient
from pydantic import Field

from medspark.config import Config
from medspark.errors import UsageError
from medspark.track.journal import JournalReader, Record
from medspark.track.models import log_model, register_model
from medspark.track.spool import DatasetEntry, Ending, ModelEntry, RunEntry, Spool, State, Status
from medspark.track.store import first_line, quieten, tracking_uri

__all__ = ["TrackConfig", "TrackedRun", "fetch_artifact", "tracked"]

logger = logging.getLogger(__name__)

# MLflow's limits for one request (mlflow/utils/validation.py).
_METRICS_PER_BATCH, _PARAMS_PER_BATCH, _PARAM_LENGTH, _DIGEST_LENGTH = 1000, 100, 6000, 36
_TAG_LENGTH = 8000


class TrackConfig(Config):
    """Where runs are recorded."""

    uri: str | None = Field(
        None,
        description="MLflow tracking URI (http://…, databricks, sqlite:///…); by default "
        "MLFLOW_TRACKING_URI, on Databricks the workspace, else a database below mlruns/",
    )
    experiment: str = Field("medspark", description="MLflow experiment; on Databricks a path")
    run_name: str | None = Field(None, description="name of the run; by default what it trains")
    parent_run_id: str | None = Field(None, description="run that this one is a child of")
    log_model: bool = Field(True, description="keep the model in MLflow, not only in its folder")
    register_as: str | None = Field(
        None,
        description="register the model under this name, on Databricks CATALOG.SCHEMA.NAME, as one "
        "that answers DICOM and PNG files",
    )
    alias: str = Field("candidate", description="alias that the registered version gets")
    system_metrics: bool = Field(True, description="record processor and memory use of the driver")
    patience_seconds: float = Field(
        20.0, ge=0, description="seconds to wait at the end for a server that is away"
    )


class TrackedRun:
    """One run: its spool on disk, and the thread that publishes it while it grows."""

    def __init__(self, spool: Spool, *, system_metrics: bool = False) -> None:
        quieten()
        self.spool = spool
        self._reader = JournalReader(spool.journal)
        self._pending: list[Metric] = []
        self._counted = dict(spool.state.published)
        self._away = False
        self._lock = threading.Lock()
        self._system_metrics = system_metrics
        self._offered = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mlflow", daemon=True)

    @functools.cached_property
    def _client(self) -> MlflowClient:
        # Made in the background: a local store that is new makes its tables now, for seconds.
        return MlflowClient(self.spool.state.uri)

    @property
    def reference(self) -> dict[str, str | None]:
        """Where the run is found; ``run_id`` is None while MLflow has not taken it.

        Waits until it has been offered the run.
        """
        if self._thread.is_alive():
            self._offered.wait()
        state = self.spool.state
        return {
            "run_id": state.run_id,
            "uri": state.uri,
            "experiment": state.experiment,
            "model": state.model_uri,
            "registered": state.registered,
        }

    def charts_of_children(self, *, order_by: str) -> str:
        """Return the address, below that of the server, of charts that compare this run's children.

        MLflow shows the children of a run beside each other only where they are sorted by a metric.
        """
        state = self.spool.state
        if state.run_id is None:
            return ""
        experiment = self._client.get_run(state.run_id).info.experiment_id
        query = {
            "compareRunsMode": "CHART",
            "orderByKey": f"metrics.`{order_by}`",
            "orderByAsc": "false",
            "searchFilter": f"tags.mlflow.parentRunId = '{state.run_id}'",
        }
        return f"#/experiments/{experiment}/runs?{urlencode(query, quote_via=quote)}"

    def start(self) -> None:
        """Begin to publish in the background, the run itself first: training waits for nothing."""
        self._thread.start()

    def end(
        self,
        status: Status,
        *,
        params: Mapping[str, Any] | None = None,
        summary: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        artifacts: Path | None = None,
        model: ModelEntry | None = None,
        patience_seconds: float = 20.0,
    ) -> None:
        """Publish the rest, ``summary`` at step 0, the files in ``artifacts``, and ``model``."""
        self._halt()
        ending = Ending(
            status=status,
            params=dict(params or {}),
            summary=dict(summary or {}),
            tags=dict(tags or {}),
            artifacts=artifacts,
            model=model,
        )
        self.spool.update(ending=ending)
        deadline = time.monotonic() + patience_seconds
        while not self.publish() and time.monotonic() < deadline:
            time.sleep(1)
        if not self.spool.state.complete:
            logger.warning(
                "MLflow at %s has not taken the run; nothing is lost, publish it later with: "
                "python -m medspark.track %s",
                self.spool.state.uri,
                self.spool.folder,
            )

    def publish(self) -> bool:
        """Bring MLflow up to date with the spool; return whether it took everything."""
        with self._lock:
            try:
                self._create()
                self._describe()
                self._publish_metrics()
                self._finish()
            except Exception as error:  # whatever the store says, it is away
                if not self._away:
                    logger.warning("MLflow is away, training goes on: %s", first_line(error))
                    logger.debug("what MLflow's store raised", exc_info=error)
                self._away = True
                return False
            if self._away:
                logger.warning("MLflow is back")
            self._away = False
            return True

    @property
    def _run_id(self) -> str:
        run_id = self.spool.state.run_id
        assert run_id is not None, "the run has been created"
        return run_id

    def _follow(self) -> None:
        try:
            self.publish()
        finally:
            self._offered.set()
        with self._watched_machine():
            while not self._stop.wait(2.0):
                self.publish()

    @contextmanager
    def _watched_machine(self) -> Iterator[None]:
        """Have MLflow record what processor and memory do, if that is wanted."""
        state = self.spool.state
        if not self._system_metrics or state.run_id is None:
            yield
            return
        monitor = SystemMetricsMonitor(  # type: ignore[no-untyped-call]
            state.run_id,
            # The default of 10 s leaves a short run without any.
            sampling_interval=2,
            samples_before_logging=2,
            resume_logging=bool(state.published),
            node_id="driver",
            tracking_uri=state.uri,
        )
        monitor.start()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            monitor.finish()  # type: ignore[no-untyped-call]

    def _halt(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _create(self) -> None:
        state = self.spool.state
        if state.run_id is not None:
            return
        experiment = _experiment_id(self._client, state)
        tags = {"mlflow.source.name": "medspark"} | state.entry.tags
        if state.parent_run_id:
            tags["mlflow.parentRunId"] = state.parent_run_id
        run = self._client.create_run(experiment, tags=tags, run_name=state.entry.name)
        self.spool.update(run_id=run.info.run_id)

    def _describe(self) -> None:
        if self.spool.state.described:
            return
        entry = self.spool.state.entry
        values = dict(_leaves(entry.config)) | entry.params
        params = [Param(key, str(value)[:_PARAM_LENGTH]) for key, value in values.items()]
        for start in range(0, len(params), _PARAMS_PER_BATCH):
            self._client.log_batch(self._run_id, params=params[start : start + _PARAMS_PER_BATCH])
        if entry.dataset is not None:
            self._client.log_inputs(self._run_id, [_dataset_input(entry.dataset)])
            self._client.set_tag(self._run_id, "medspark.dataset_digest", entry.dataset.digest)
        document = yaml.safe_dump(entry.config, sort_keys=False, allow_unicode=True)
        self._client.log_text(self._run_id, document, "config.yaml")
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
        if ending.artifacts is not None and ending.artifacts.is_dir():
            self._client.log_artifacts(self._run_id, str(ending.artifacts))
        if ending.model is not None and self.spool.state.model_uri is None:
            self.spool.update(
                model_uri=log_model(ending.model, run_id=self._run_id, uri=self.spool.state.uri)
            )
        if (
            ending.model is not None
            and ending.model.register_as
            and not self.spool.state.registered
        ):
            self.spool.update(
                registered=register_model(
                    ending.model,
                    ending.model.register_as,
                    run_id=self._run_id,
                    uri=self.spool.state.uri,
                )
            )
        self._client.set_terminated(self._run_id, ending.status)
        self.spool.update(complete=True)


@contextmanager
def tracked(folder: Path, config: TrackConfig, entry: RunEntry) -> Iterator[TrackedRun]:
    """Record what happens inside as one run; one that the block does not end has failed.

    A ``folder`` that holds the spool of an interrupted run continues that run.
    """
    uri = tracking_uri(config.uri)
    state = State(
        entry=entry.model_copy(update={"name": config.run_name or entry.name}),
        uri=uri,
        experiment=_experiment_name(config.experiment, uri),
        parent_run_id=config.parent_run_id,
    )
    run = TrackedRun(Spool.open(folder, state), system_metrics=config.system_metrics)
    run.start()
    try:
        yield run
    except KeyboardInterrupt:
        run.end("KILLED")
        raise
    except BaseException as error:
        why = {"medspark.error": f"{type(error).__name__}: {first_line(error)}"}
        run.end("FAILED", tags=why, patience_seconds=config.patience_seconds)
        raise


def fetch_artifact(run_id: str, path: str, config: TrackConfig) -> Path:
    """Download the file ``path`` of a run. Raises UsageError where there is none."""
    try:
        found = mlflow.artifacts.download_artifacts(
            run_id=run_id, artifact_path=path, tracking_uri=tracking_uri(config.uri)
        )
    except (MlflowException, OSError) as error:
        raise UsageError(f"There is no run {run_id} with {path}: {first_line(error)}") from None
    return Path(found)


def _experiment_id(client: MlflowClient, state: State) -> str:
    found = client.get_experiment_by_name(state.experiment)
    if found is None:
        location = None
        if state.uri.startswith("sqlite:///"):
            database = Path(state.uri.removeprefix("sqlite:///"))
            location = (database.resolve().parent / "artifacts" / state.experiment).as_uri()
        # Another driver may make it at the same moment: then it is there all the same.
        with suppress(MlflowException):
            return str(client.create_experiment(state.experiment, artifact_location=location))
        found = client.get_experiment_by_name(state.experiment)
    if found is None:
        raise MlflowException(f"the experiment {state.experiment} cannot be created")
    return str(found.experiment_id)


def _experiment_name(name: str, uri: str) -> str:
    """Return ``name`` as the store wants it: a workspace's experiments are paths."""
    return f"/Shared/{name}" if uri.startswith("databricks") and not name.startswith("/") else name


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _new_metrics(record: Record, counted: dict[str, int]) -> list[Metric]:
    """Return the metrics of ``record`` that are beyond ``counted``, and count them.

    A resumed run does the steps since its checkpoint again; they are reported once.
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
