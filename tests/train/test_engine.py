"""An engine goes on from its tensors as if it had not stopped, and takes bf16 where it pays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from medspark.attacks.threat import ThreatModel
from medspark.data.batch import Batch
from medspark.models.classifier import Classifier
from medspark.train.adversarial import Sample
from medspark.train.config import TrainConfig
from medspark.train.engine import Engine, bf16_pays
from medspark.train.objective import CrossEntropy
from medspark.train.state import Checkpoints
from medspark.train.world import World

Tiny = Callable[..., Classifier]
Make = Callable[..., Sample]


def engine_on(device: torch.device, model: Classifier, **chosen: object) -> Engine:
    return Engine(
        model,
        config=TrainConfig.model_validate({"precision": "fp32", "batch_size": 10} | chosen),
        threat=ThreatModel(eps=8 / 255),
        objective=CrossEntropy(),
        image_shape=(1, 12, 12),
        total_steps=4,
        seed=0,
        world=World(0, 0, 1, device),
    )


def losses(engine: Engine, given: Sample, steps: range) -> list[float]:
    """Return the losses of ``steps`` on ``given`` as the reader delivers it."""
    images = (given.images * 255).to(torch.uint8)
    batch = Batch(images, given.labels, np.arange(10), 1.0, 10, 0, 0)
    return [float(engine.step(batch, step).figures[0]) for step in steps]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_saved_engine_goes_on_as_if_it_had_not_stopped(
    frozen: bool, device: torch.device, tiny: Tiny, sample: Make, tmp_path: Path
):
    engines = []
    for _ in range(2):
        model = tiny()
        model.batch_norm_frozen = frozen
        engines.append(engine_on(device, model, ema=0.9))
    unbroken, resumed = engines
    losses(unbroken, sample(), range(2))
    checkpoints = Checkpoints(tmp_path, attempt=0, keep=1)
    checkpoints.save(2, unbroken.tensors(), {})
    saved = checkpoints.latest()
    assert saved is not None

    resumed.restore(saved.tensors)

    assert losses(resumed, sample(), range(2, 4)) == losses(unbroken, sample(), range(2, 4))
    left, right = unbroken.tensors(), resumed.tensors()
    assert left.keys() == right.keys()
    assert all(left[name].device == right[name].device for name in left)
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("mode", ["fused_noise", "trades"])
def test_passes_in_bf16_learn_nearly_what_passes_in_float32_do(
    mode: str, device: torch.device, tiny: Tiny, sample: Make
):
    whole, halved = (
        losses(engine_on(device, tiny(), mode=mode, precision=precision), sample(), range(4))
        for precision in ("fp32", "bf16")
    )

    assert halved != whole
    assert halved == pytest.approx(whole, abs=0.05)


def test_a_gpu_that_only_emulates_bf16_computes_in_float32(monkeypatch: pytest.MonkeyPatch):
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)

    assert not bf16_pays(torch.device("cuda"))
