"""The sanity probes take sanity_images images, for any choice of attacked images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medspark.evaluate import robust
from medspark.evaluate.config import AttackSettings
from medspark.train.config import FitConfig
from medspark.train.loop import fit
from medspark.train.world import World


@given(
    total=st.integers(1, 5000), images=st.none() | st.integers(1, 6000), asked=st.integers(0, 300)
)
def test_as_many_of_the_attacked_images_are_probed_as_were_asked_for(
    total: int, images: int | None, asked: int
) -> None:
    config = AttackSettings(images=images, sanity_images=asked)
    rows = config.rows(total)

    assert (rows < config.probed_below(rows)).sum() == min(asked, len(rows))


class Silent:
    def record(self, step: int, metrics: object) -> None: ...


@pytest.mark.parametrize(("images", "probed"), [(8, 5), (3, 3), (None, 5)])
def test_a_training_probes_the_images_that_it_attacked(
    images: int | None, probed: int, write_shards: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[Any] = []
    real = robust.summarise

    def watched(arrays: Any, *rest: Any, **more: Any) -> Any:
        seen.append(arrays.get("margin_held"))
        return real(arrays, *rest, **more)

    monkeypatch.setattr(robust, "summarise", watched)
    config = FitConfig.model_validate(
        {
            "shards": write_shards(rows=40, side=32),
            "run_dir": tmp_path,
            "model": {"name": "test_resnet"},
            "train": {"epochs": 1, "batch_size": 20, "mode": "standard", "validation_images": 2},
            "evaluate": {"attacks": ["fgsm"], "steps": 1, "images": images, "sanity_images": 5},
        }
    )

    fit(config, World(0, 0, 1, torch.device("cpu")), Silent())

    assert np.isfinite(seen[-1]).sum() == probed
