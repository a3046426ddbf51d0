"""Save a view of MLflow's run list with the columns to compare, and a note that links to it.

By default the list shows names, dates and data, but no parameters or metrics. MLflow stores a saved
view as a tag of the experiment, and opens it by ``?viewStateShareKey=``.
"""

from __future__ import annotations

import json

from mlflow.tracking import MlflowClient

__all__ = ["METRICS", "PARAMS", "describe_experiment", "run_list"]

PARAMS = ("model", "mode", "world_size", "data_share")
METRICS = ("images_per_second", "clean_auroc", "worst_case")

_KEY = "medspark"
_VIEW_TAG, _NOTE_TAG = f"mlflow.sharedViewState.{_KEY}", "mlflow.note.content"
_MADE_MS = 1_764_288_000_000  # the view's date, a constant


def describe_experiment(client: MlflowClient, experiment: str) -> None:
    """Give ``experiment`` the saved view, and a note that links to it unless it has a note."""
    tags = client.get_experiment(experiment).tags
    wanted = {_VIEW_TAG: _view()} | ({} if _NOTE_TAG in tags else {_NOTE_TAG: _note(experiment)})
    for tag, value in wanted.items():
        if tags.get(tag) != value:
            client.set_experiment_tag(experiment, tag, value)


def run_list(experiment: str) -> str:
    """Return the URL of the view, relative to the server's."""
    # Without the type, MLflow opens an experiment as one of language models.
    return f"#/experiments/{experiment}/runs?viewStateShareKey={_KEY}&workflowType=machine_learning"


def _view() -> str:
    """Return the view in MLflow's format: a name, dates, and the state of the page."""
    columns = [f"params.`{name}`" for name in PARAMS] + [f"metrics.`{name}`" for name in METRICS]
    state = {"selectedColumns": columns, "runListHidden": False}
    dates = {"createdAt": _MADE_MS, "updatedAt": _MADE_MS}
    return json.dumps({"name": "Compare runs", **dates, "state": json.dumps(state)})


def _note(experiment: str) -> str:
    by_speed, by_worst = (
        f"#/experiments/{experiment}/runs?compareRunsMode=CHART&orderByAsc=false"
        f"&orderByKey=metrics.%60{metric}%60"
        for metric in ("images_per_second", "worst_case")
    )
    return (
        f"**[Compare the runs]({run_list(experiment)})**: model, mode, processes, share of the "
        "data, images per second, clean AUROC, and the accuracy that the worst attack leaves at "
        "the eps of the training. The menu *Views* opens the same list.\n\n"
        f"As charts: [by speed]({by_speed}), [by worst case]({by_worst})."
    )
