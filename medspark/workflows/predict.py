"""Apply a model to the files of an archive, on Spark, and return what was found."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pyspark.sql import SparkSession

from medspark.job import Result
from medspark.models.prediction import rendering_of
from medspark.predict.archive import Asked, ModelFacts, open_archive
from medspark.predict.config import PredictConfig
from medspark.predict.pipeline import predict
from medspark.remote import any_path
from medspark.workflows.shipped_model import ModelFiles

__all__ = ["PredictResult", "Prediction"]


class PredictResult(Result):
    """The result document of jobs/predict.py."""

    model: str
    model_digest: str
    files_found: int = Field(description="answered and quarantined")
    answered: int
    quarantined: int
    quarantine_reasons: dict[str, int]
    labels: dict[str, int] = Field(description="answered files by label; of findings, by finding")
    done_before: int = Field(description="files of this archive whose rows were there already")
    done_now: int
    seconds: float = Field(description="of decoding and answering, without Spark's start")
    images_per_second: float | None = Field(description="files of this run, all cores together")
    answers: str = Field(description="folder of the Parquet files with a row for each answer")
    quarantine_file: str | None = Field(description="private list of the files without an answer")
    paths_file: str | None = Field(description="private list of the files' keys and paths")


class Prediction:
    """One prediction: checked before Spark starts, run by Spark."""

    def __init__(self, config: PredictConfig) -> None:
        """Open the model and the archive. Raises UsageError if they cannot be used."""
        folder = _folder(config.model, uri=config.track.uri)
        self._model = ModelFiles.read(folder)
        card = self._model.card
        facts = ModelFacts(
            digest=self._model.digest,
            classes=card.classes,
            multi_label=card.multi_label,
            rendering=rendering_of(card),
        )
        self._asked: Asked = open_archive(config, facts, read={"the model": folder})
        self._model.check()

    def run(self, spark: SparkSession) -> PredictResult:
        """Answer what has no answer yet, and return the result document."""
        found = predict(spark, self._asked, self._model.shipped(spark))
        about = {"model": self._asked.config.model, "model_digest": self._model.digest}
        return PredictResult.model_validate(about | found)


def _folder(name: str, *, uri: str | None) -> Path:
    if name.startswith(("models:/", "runs:/")):
        from medspark.track.models import fetch_model  # imports mlflow

        return fetch_model(name, uri=uri)
    return any_path(name)
