"""The served model, as MLflow's models-from-code wants it: a script, so that nothing is pickled."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class ServedModel(PythonModel):  # type: ignore[misc]
    """Calls whatever the run named as its model's loader with the model's folder."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the folder that was logged."""
        loader = pkgutil.resolve_name(context.model_config["loader"])
        self._predict = loader(Path(context.artifacts["model"]))

    # MLflow reads the hints as a schema; it knows the bare array, and warns about any other.
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
