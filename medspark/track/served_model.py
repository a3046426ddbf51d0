"""The served model, a script for MLflow's models-from-code, so that nothing is pickled."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class ServedModel(PythonModel):  # type: ignore[misc]
    """Loads the model's folder with the run's ``loader`` and calls it."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the logged folder."""
        loader = pkgutil.resolve_name(context.model_config["loader"])
        self._predict = loader(Path(context.artifacts["model"]))

    # MLflow reads the type hints as a schema, and warns about any but the bare array.
    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002
        model_input: np.ndarray,  # type: ignore[type-arg]
        params: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> np.ndarray:  # type: ignore[type-arg]
        """Return class probabilities (N, K) of images (N, H, W, C) in [0, 1]."""
        probabilities: npt.NDArray[np.float32] = self._predict(np.asarray(model_input))
        return probabilities


set_model(ServedModel())
