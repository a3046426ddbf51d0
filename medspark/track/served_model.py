"""The served model, as MLflow's models-from-code wants it: a script, so that nothing is pickled."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class ServedModel(PythonModel):  # type: ignore[misc]
    """Calls whatever the run named as its model's loader with the model's folder."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the folder that was logged."""
        loader = pkgutil.resolve_name(context.model_config["loader"])
        self._predict = loader(Path(context.artifacts["model"]))

    # MLflow reads type hints as a schema, and warns about those of arrays.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ARG002
        """Return class probabilities (N, K) of images (N, H, W, C) in [0, 1]."""
        return self._predict(np.asarray(model_input))


set_model(ServedModel())
