"""Log networks with an MLflow run, register them under a name, and fetch them by run or name."""

from __future__ import annotations

import warnings
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, DataType, Schema, TensorSpec

from medspark.errors import UsageError
from medspark.redact import safe_text
from medspark.track.config import TrackConfig
from medspark.track.spool import ModelEntry
from medspark.track.store import first_line, quieten, tracking_uri

__all__ = ["fetch_artifact", "fetch_model", "log_model", "register_model"]

# The packages that read DICOM and image files.
_READ_FILES = (
    "pandas", "pillow", "pydicom", "python-gdcm", "pyjpegls", "pylibjpeg", "pylibjpeg-openjpeg",
)  # fmt: skip


def log_model(model: ModelEntry, *, run_id: str, uri: str) -> str:
    """Log ``model`` with array inputs, and return its URI."""
    rows = (1, *model.input_shape)
    info = _logged(
        "model",
        model,
        run_id=run_id,
        uri=uri,
        source="served_model.py",
        model_config={"loader": model.loader},
        signature=ModelSignature(
            Schema([TensorSpec(np.dtype("f4"), (-1, *model.input_shape))]),
            Schema([TensorSpec(np.dtype("f4"), (-1, model.outputs))]),
        ),
        # A synthetic example: one from the data would publish a patient's image.
        input_example=np.linspace(0, 1, int(np.prod(rows)), dtype="f4").reshape(rows),
        pip_requirements=_requirements(*model.packages),
    )
    return str(info.model_uri)


def register_model(model: ModelEntry, name: str, *, run_id: str, uri: str) -> str:
    """Log the model with file inputs, register it as ``name``, and return its URI by alias."""
    # The columns are optional: an unreadable file gets only the error, and a suspicious one perhaps
    # no label.
    texts = [ColSpec(DataType.string, each, required=False) for each in ("label", "error")]
    numbers = ("probability", *model.classes, *(["p_value"] if model.guarded else []))
    columns: list[Any] = [ColSpec(DataType.double, each, required=False) for each in numbers]
    if model.guarded:
        columns.append(ColSpec(DataType.boolean, "suspicious", required=False))
    info = _logged(
        "served",
        model,
        run_id=run_id,
        uri=uri,
        source="served_files.py",
        model_config={"file_loader": model.file_loader},
        signature=ModelSignature(
            Schema([ColSpec(DataType.string, "image")]),
            Schema([*texts, *columns]),
        ),
        pip_requirements=_requirements(*model.packages, *_READ_FILES),
        registered_model_name=name,
        await_registration_for=60,
    )
    version, client = str(info.registered_model_version), MlflowClient(uri)
    client.update_model_version(name, version, model.card)
    client.set_registered_model_alias(name, model.alias, version)
    return f"models:/{name}@{model.alias}"


def fetch_model(model_uri: str, *, uri: str | None = None) -> Path:
    """Download a model from the store ``uri``, by default the usual one.

    ``model_uri`` is ``models:/m-…``, ``models:/NAME/VERSION``, ``models:/NAME@ALIAS`` or
    ``runs:/RUN/NAME``. Returns the logged folder. Raises UsageError if the store does not have the
    model or does not answer.
    """
    uri = tracking_uri(uri)
    quieten()
    try:
        # Set the registry too; otherwise MLflow uses the last one of this process.
        found = _logged_model(MlflowClient(uri, registry_uri=uri), model_uri)
        folder = mlflow.artifacts.download_artifacts(found.artifact_location, tracking_uri=uri)
    except (MlflowException, OSError) as error:
        raise UsageError(
            f"The model {model_uri} cannot be had from MLflow at {safe_text(uri)}: "
            f"{first_line(error).rstrip('.')}."
        ) from error
    return Path(folder) / "artifacts" / "model"


def _logged(
    name: str, model: ModelEntry, *, run_id: str, uri: str, source: str, **logged: Any
) -> Any:
    """Log ``model`` with ``source`` as its models-from-code script, so that nothing is pickled."""
    mlflow.set_tracking_uri(uri)
    with mlflow.start_run(run_id=run_id), warnings.catch_warnings():
        # MLflow warns about the type hints of its own modules.
        warnings.simplefilter("ignore", UserWarning)
        return mlflow.pyfunc.log_model(
            name=name,
            python_model=str(Path(__file__).with_name(source)),
            artifacts={"model": str(model.folder)},
            code_paths=[str(Path(__file__).parents[1])],
            **logged,
        )


def _logged_model(client: MlflowClient, model_uri: str) -> LoggedModel:
    """Return the logged model at ``model_uri``. Raises MlflowException if there is none."""
    scheme, _, place = model_uri.partition(":/")
    name, _, rest = place.partition("/")
    if scheme == "runs":
        return _model_of_run(client, name, rest)
    if rest:
        return _logged_model(client, str(client.get_model_version(name, rest).source))
    name, _, alias = name.partition("@")
    if alias:
        version = client.get_model_version_by_alias(name, alias)
        return _logged_model(client, str(version.source))
    return client.get_logged_model(name)


def _model_of_run(client: MlflowClient, run_id: str, name: str) -> LoggedModel:
    outputs = client.get_run(run_id).outputs
    logged = (outputs.model_outputs if outputs else None) or []
    models = [client.get_logged_model(output.model_id) for output in logged]
    named = [model for model in models if model.name == name or not name]
    if not named:
        names = ", ".join(model.name for model in models) or "none at all"
        raise MlflowException(f"the run {run_id} logged no model '{name}'; it logged {names}")
    return named[-1]


def _requirements(*more: str) -> list[str]:
    names = ("mlflow", "numpy", "pydantic", "pydantic-settings", "pyyaml")
    found = []
    for name in (*names, *more):
        with suppress(PackageNotFoundError):
            found.append(f"{name}=={version(name).split('+')[0]}")
    return found


def fetch_artifact(run_id: str, path: str, config: TrackConfig) -> Path:
    """Download the file ``path`` of a run. Raises UsageError if there is none."""
    try:
        found = mlflow.artifacts.download_artifacts(
            run_id=run_id, artifact_path=path, tracking_uri=tracking_uri(config.uri)
        )
    except (MlflowException, OSError) as error:
        raise UsageError(f"There is no run {run_id} with {path}: {first_line(error)}") from None
    return Path(found)
