"""The model that is registered: image files in base64 in, calibrated probabilities out."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class Answers(pd.DataFrame):  # type: ignore[misc]
    """A table whose records, which MLflow sends as JSON, have only what their row has."""

    def to_dict(self, orient: str = "dict", **settings: Any) -> Any:
        """Return what pandas returns, in records without the values that a row lacks."""
        found = super().to_dict(orient, **settings)
        if orient != "records":
            return found
        return [{k: v for k, v in row.items() if not pd.isna(v)} for row in found]


class ServedFiles(PythonModel):  # type: ignore[misc]
    """Calls whatever the run named as its model's loader with the model's folder."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the folder that was logged."""
        loader = pkgutil.resolve_name(context.model_config["file_loader"])
        self._predict = loader(Path(context.artifacts["model"]))

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> pd.DataFrame:
        """Return a row for each of the files in column ``image``.

        It has label and probabilities, or an ``error`` that says why the file has none.
        """
        return Answers(self._predict(list(model_input["image"])))


set_model(ServedFiles())
