"""The registered model: it takes image files in base64 and returns calibrated probabilities."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext


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
        return Answers(self._predict(list(model_input["image"])))


set_model(ServedFiles())
