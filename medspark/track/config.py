"""Where runs are recorded."""

from __future__ import annotations

from pydantic import Field

from medspark.config import Config

__all__ = ["TrackConfig"]


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
