"""The view of MLflow's run list that shows what people compare, and the experiment's note on it.

By itself the list shows names, dates and data, and no parameter or metric. MLflow keeps a view that
users save as a tag of the experiment, and opens it by ``?viewStateShareKey=``: so we save one.
"""

from __future__ import annotations

import json

from mlflow.tracking import MlflowClient

__all__ = ["METRICS", "PARAMS", "describe_experiment", "run_list"]

PARAMS = ("model", "mode", "world_size", "data_share")
METRICS = ("images_per_second", "clean_auroc", "worst_case")

_KEY = "medspark"
_VIEW_TAG, _NOTE_TAG = f"mlflow.sharedViewState.{_KEY}", "mlflow.note.content"
_MADE_MS = 1_764_288_000_000  # a view has a date; ours is always the same


def describe_experiment(client: MlflowClient, experiment: str) -> None:
    """Give ``experiment`` the saved view, and a note that links to it where it has no note yet."""
    tags = client.get_experiment(experiment).tags
    wanted = {_VIEW_TAG: _view()} | ({} if _NOTE_TAG in tags else {_NOTE_TAG: _note(experiment)})
    for tag, value in wanted.items():
        if tags.get(tag) != value:
            client.set_experiment_tag(experiment, tag, value)


def run_list(experiment: str) -> str:
    """Return the address of the view, below that of the server."""
    return f"#/experiments/{experiment}/runs?viewStateShareKey={_KEY}"


def _view() -> str:
    """Return the view as MLflow saves one: a name, dates, and what the page looks like."""
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
