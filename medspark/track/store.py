"""Choose the MLflow store, and limit its logging and its waiting times."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from medspark.redact import safe_text

__all__ = ["experiment_name", "first_line", "quieten", "tracking_uri"]

_LOCAL_STORE = Path("mlruns")


def tracking_uri(uri: str | None) -> str:
    """Return ``uri`` or else the default tracking URI; create the local database's folder."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri
    if "DATABRICKS_RUNTIME_VERSION" in os.environ:
        return "databricks"
    _LOCAL_STORE.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{(_LOCAL_STORE / 'mlflow.db').resolve()}"


def experiment_name(name: str, uri: str) -> str:
    """Return the store's form of ``name``: on Databricks, experiments are workspace paths."""
    return f"/Shared/{name}" if uri.startswith("databricks") and not name.startswith("/") else name


def quieten() -> None:
    """Shorten MLflow's waits for an unreachable server, and silence its logging."""
    # Otherwise MLflow prints the URL of every run, with user and password.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("alembic", "mlflow", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


def first_line(error: BaseException) -> str:
    """Return the first line of an error, without the secrets in URLs."""
    return (safe_text(str(error)).splitlines() or [type(error).__name__])[0][:200]
