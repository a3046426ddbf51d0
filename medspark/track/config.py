"""The configuration of tracking: the MLflow store, the experiment and the registry."""

from __future__ import annotations

from pydantic import Field

from medspark.config import Config

__all__ = ["TrackConfig"]


class TrackConfig(Config):
    """The MLflow store, experiment and registry of runs."""

    uri: str | None = Field(
        None,
        description="MLflow tracking URI (http://…, databricks, sqlite:///…); by default "
        "MLFLOW_TRACKING_URI, on Databricks the workspace, else a database below mlruns/",
    )
    experiment: str = Field("medspark", description="MLflow experiment; on Databricks a path")
    run_name: str | None = Field(None, description="name of the run; by default model and mode")
    parent_run_id: str | None = Field(None, description="MLflow id of the parent run")
    log_model: bool = Field(True, description="keep the model in MLflow, not only in its folder")
    register_as: str | None = Field(
        None,
        description="register a model that reads DICOM and PNG files under this name, on "
        "Databricks CATALOG.SCHEMA.NAME",
    )
    alias: str = Field("candidate", description="alias of the registered version")
    system_metrics: bool = Field(True, description="record processor and memory use of the driver")
    patience_seconds: float = Field(
        20.0, ge=0, description="seconds to wait at the end for an unreachable server"
    )
