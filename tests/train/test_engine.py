"""An engine resumes exactly from its tensors, and uses bf16 if that is faster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_network import engine_for

from medspark.data.batch import Batch
from medspark.errors import RunError
from medspark.models.backbones import build
from medspark.models.classifier import Classifier
from medspark.models.config import ModelConfig
from medspark.train.adversarial import MODES
from medspark.train.engine import Engine
from medspark.train.learner import Sample, bf16_pays
from medspark.train.objective import CrossEntropy
from medspark.train.schedule import one_cycle
from medspark.train.state import Checkpoints
from medspark.train.world import World

Tiny = Callable[..., Classifier]
Make = Callable[..., Sample]


def engine_on(device: torch.device, model: Classifier, **chosen: object) -> Engine:
    return engine_for(model, world=World(0, 0, 1, device), **{"batch_size": 10} | chosen)


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


WAYS: list[dict[str, object]] = [
    *({"mode": mode} for mode in MODES),
    {"mode": "fused_noise", "precision": "bf16", "accumulate": 2, "ema": 0.9},
    {"mode": "fused", "elastic": "exact", "virtual_shards": 2},
    {"mode": "nfgsm", "gradalign": 0.2},
    {"mode": "fused", "dual_bn": True},
    {"mode": "fused", "awp": 0.01, "awp_after": 0.0},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_a_step_does_not_wait_for_the_device(
    way: dict[str, object], tiny: Tiny, sample: Make
) -> None:
    pretended = pytest.importorskip("pretended", exc_type=ImportError)
    with pretended.pretended_device() as device:
        engine = engine_on(device, tiny(), **way)
        with pretended.waits() as heard:
            for step in range(2):
                engine.step(plain_batch(sample(dtype=torch.float32)), step)
        with pretended.waits() as read:
            engine.check()

    assert heard == []
    assert read


def test_a_gpu_that_only_emulates_bf16_computes_in_float32(monkeypatch: pytest.MonkeyPatch):
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)

    assert not bf16_pays(torch.device("cuda"))


def moved(engine: Engine, batch: Batch, step: int) -> set[str]:
    """Return the names of the parameters that a step changes."""
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    engine.step(batch, step)
    return {n for n, p in engine.model.named_parameters() if not torch.equal(p, before[n])}


def plain_batch(given: Sample) -> Batch:
    return Batch((given.images * 255).to(torch.uint8), given.labels, np.arange(10), 1.0, 10, 0, 0)


CPU = torch.device("cpu")


@pytest.mark.parametrize(("mode", "updates"), [("fused", 1), ("free", 3)])
def test_in_the_first_steps_only_the_head_is_trained(mode: str, updates: int) -> None:
    model = build(ModelConfig(name="test_efficientnet"), num_classes=2, channels=1)
    chosen = {"mode": mode, "head_steps": 2, "replays": updates}
    engine = engine_for(model, image_shape=(1, 32, 32), **chosen)
    images = torch.arange(4 * 32 * 32).view(4, 1, 32, 32).mul(7).remainder(251).to(torch.uint8)
    batch = Batch(images, torch.tensor([0, 1, 0, 1]), np.arange(4), 1.0, 4, 0, 0)

    first, second, third = (moved(engine, batch, step) for step in range(3))

    assert first == second == {"backbone.classifier.weight", "backbone.classifier.bias"}
    assert len(third) > 0.9 * len(list(model.parameters()))


def test_what_is_deployed_is_the_average_and_training_goes_on_where_it_was(
    tiny: Tiny, sample: Make
) -> None:
    engine = engine_on(CPU, tiny(), ema=0.9)
    losses(engine, sample(), range(3))
    assert engine.average is not None
    average = {name: value.clone() for name, value in engine.average.values.items()}
    weights = {name: p.detach().clone() for name, p in engine.model.named_parameters()}

    with engine.deployable() as model:
        lent = {name: p.detach().clone() for name, p in model.named_parameters()}

    assert lent.keys() == average.keys()
    assert all(torch.equal(lent[name], average[name]) for name in lent)
    assert any(not torch.equal(lent[name], weights[name]) for name in lent)
    assert all(torch.equal(p, weights[name]) for name, p in engine.model.named_parameters())
    assert all(torch.equal(engine.average.values[name], average[name]) for name in average)


def test_without_an_average_the_weights_themselves_are_deployed(tiny: Tiny, sample: Make) -> None:
    engine = engine_on(CPU, tiny())
    losses(engine, sample(), range(2))

    with engine.deployable() as model:
        left = dict(model.named_parameters())
        assert all(torch.equal(left[name], p) for name, p in engine.model.named_parameters())


def test_a_step_without_a_finite_gradient_is_left_out_and_twenty_in_a_row_end_the_run(
    tiny: Tiny, sample: Make
) -> None:
    class Objective(CrossEntropy):
        broken = True

        def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return super().__call__(logits, labels) * (torch.nan if Objective.broken else 1.0)

    engine = engine_on(CPU, tiny(), mode="standard")
    engine._learner.objective = Objective()
    batch = plain_batch(sample())

    assert all(moved(engine, batch, 0) == set() for _ in range(19))
    Objective.broken = False
    assert moved(engine, batch, 0)
    Objective.broken = True
    assert all(moved(engine, batch, 0) == set() for _ in range(19))
    engine.check()
    engine.step(batch, 0)
    with pytest.raises(RunError, match=r"Training diverged: 20 updates .* Lower train\.lr"):
        engine.check()


def test_a_report_counts_right_answers_on_clean_and_on_attacked_images(
    tiny: Tiny, sample: Make
) -> None:
    given = sample()
    seen = {}
    for mode in ("standard", "pgd", "fused"):
        engine = engine_on(CPU, tiny(), mode=mode, eps_warmup=0.0)
        seen[mode] = engine.step(plain_batch(given), 0).figures.tolist()

    assert [seen[mode][3] for mode in seen] == [10, 10, 10]
    assert (seen["standard"][2], seen["pgd"][1]) == (0, 0)  # what the mode does not learn from
    assert seen["standard"][1] == seen["fused"][1] > 0
    assert seen["fused"][2] <= seen["fused"][1]


def test_rate_and_eps_of_a_step_are_those_of_its_place_in_the_run(tiny: Tiny, sample: Make) -> None:
    chosen = {"eps_warmup": 0.5, "lr": 0.1, "lr_rise": 0.5}
    engine = engine_on(CPU, tiny(), **chosen)

    reports = [engine.step(plain_batch(sample()), step) for step in range(4)]

    assert [report.rate for report in reports] == [
        one_cycle(step, 4, peak=0.1, rising=0.5) for step in range(4)
    ]
    assert [report.eps for report in reports] == [4 / 255, 8 / 255, 8 / 255, 8 / 255]


def test_replays_of_a_batch_are_updates_of_their_own(tiny: Tiny, sample: Make) -> None:
    engine = engine_on(CPU, tiny(), mode="free", replays=3, eps_warmup=1.0)

    reports = [engine.step(plain_batch(sample()), step) for step in range(4)]

    assert [report.eps for report in reports] == pytest.approx(
        [8 / 255 * (3 * step + 3) / 12 for step in range(4)]
    )
    assert reports[-1].rate == one_cycle(11, 12, peak=3e-4)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (3, 3)])
def test_noise_is_drawn_anew_at_every_step_and_alike_at_the_same_one(
    first: int, second: int, tiny: Tiny, sample: Make
) -> None:
    found = []
    for step in (first, second):
        engine = engine_on(CPU, tiny(), mode="nfgsm", eps_warmup=0.0)
        found.append(float(engine.step(plain_batch(sample()), step).figures[0]))

    assert (found[0] == found[1]) == (first == second)
