"""Find in MLflow which runs read which dataset, and the models that came of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from medspark.errors import RunError
from medspark.track.local_store import open_store
from medspark.track.store import first_line, quieten, tracking_uri

__all__ = ["DIGEST_TAG", "Learnt", "runs_with_data"]

DIGEST_TAG = "medspark.dataset_digest"
_PAGE = 1000


@dataclass(frozen=True)
class Learnt:
    """A run that read a dataset: the dataset's digest and folder, and registered models."""

    run_id: str
    name: str
    digest: str
    source: str
    models: tuple[str, ...]


def runs_with_data(uri: str | None) -> list[Learnt]:
    """Return every run of the MLflow store ``uri`` that read shards, whatever its experiment.

    Raises RunError if the store does not answer.
    """
    quieten()
    try:
        return list(_runs(open_store(tracking_uri(uri))))
    except (MlflowException, OSError) as error:
        raise RunError(first_line(error)) from error


def _runs(client: MlflowClient) -> Iterator[Learnt]:
    experiments = [e.experiment_id for e in client.search_experiments(view_type=ViewType.ALL)]
    token = None
    while True:
        page = client.search_runs(
            experiments, run_view_type=ViewType.ALL, max_results=_PAGE, page_token=token
        )
        for run in page:
            if DIGEST_TAG in run.data.tags:
                versions = client.search_model_versions(f"run_id='{run.info.run_id}'")
                models = tuple(sorted(f"{v.name} version {v.version}" for v in versions))
                yield _learnt(run, models)
        token = page.token
        if not token:
            return


def _learnt(run: Run, models: tuple[str, ...]) -> Learnt:
    digest = run.data.tags[DIGEST_TAG]
    return Learnt(run.info.run_id, run.info.run_name or "", digest, _source(run), models)


def _source(run: Run) -> str:
    """Return the folder of the run's dataset, or "" if the run does not name it."""
    for each in run.inputs.dataset_inputs if run.inputs else ():
        try:
            found = json.loads(each.dataset.source)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("uri"), str):
            return str(found["uri"])
    return ""
