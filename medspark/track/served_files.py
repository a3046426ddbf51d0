"""The registered model: it takes image files in base64 and returns calibrated probabilities."""

from __future__ import annotations

import pkgutil
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

_FILES_OF_A_TURN = 64


class Answers(pd.DataFrame):  # type: ignore[misc]
    """A table whose records, which MLflow sends as JSON, omit missing values."""

    def to_dict(self, orient: str = "dict", **settings: Any) -> Any:
        """Return what pandas returns; with ``orient="records"``, without missing values."""
        found = super().to_dict(orient, **settings)
        if orient != "records":
            return found
        return [{k: v for k, v in row.items() if not pd.isna(v)} for row in found]


class ServedFiles(PythonModel):  # type: ignore[misc]
    """Loads the model's folder with the run's ``file_loader`` and calls it."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the logged folder."""
        loader = pkgutil.resolve_name(context.model_config["file_loader"])
        self._predict = loader(Path(context.artifacts["model"]))

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> pd.DataFrame:
        """Return a row for each file in column ``image``.

        The row holds label and probabilities, or an ``error`` that gives the reason.
        """
        files = list(model_input["image"])
        if not _in_spark_task():
            return Answers(self._predict(files))
        # A server limits the time of a request. A task of Spark brings thousands of files at once,
        # and keeps nobody waiting.
        starts = range(0, len(files), _FILES_OF_A_TURN)
        parts = [self._predict(files[start : start + _FILES_OF_A_TURN]) for start in starts]
        # spark_udf needs every column, and would write a missing text as "nan".
        table = pd.DataFrame(chain.from_iterable(parts), columns=self._predict.columns)
        return table.fillna({"label": "", "error": ""})


def _in_spark_task() -> bool:
    """Return whether this is a Python worker of Spark, as for ``mlflow.pyfunc.spark_udf``."""
    loaded = sys.modules.get("pyspark.taskcontext")
    return loaded is not None and loaded.TaskContext.get() is not None


set_model(ServedFiles())
