"""What a federation cannot do is said before it starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from array_shards import write_arrays

from medspark.errors import UsageError
from medspark.models.backbones import build
from medspark.models.card import Pruning
from medspark.models.checkpoint import describe, save_classifier
from medspark.models.config import ModelConfig
from medspark.workflows.federate import check
from medspark.workflows.federate_config import FederateConfig


def test_a_pruned_model_is_refused_as_first_weights(tmp_path: Path) -> None:
    arrays = np.zeros((8, 32, 32, 1), dtype=np.uint8), np.arange(8) % 2
    shards = write_arrays(tmp_path / "shards", {"train": arrays, "test": arrays})
    model = build(ModelConfig(name="test_resnet"), num_classes=2, channels=1)
    pruning = Pruning(method="magnitude", sparsity=0.5)
    card = describe(model, classes=("a", "b"), height=32, width=32, pruning=pruning)
    save_classifier(tmp_path / "model", model, card)
    first = ModelConfig(name="test_resnet", weights=str(tmp_path / "model"))

    with pytest.raises(UsageError, match="is pruned, and clients do not keep"):
        check(FederateConfig(shards=shards, model=first))
