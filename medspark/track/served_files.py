"""The model that is registered: image files in base64 in, calibrated probabilities out."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext


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
        """Return a row of label and probabilities for each of the files in column ``image``."""
        return pd.DataFrame(self._predict(list(model_input["image"])))


set_model(ServedFiles())
