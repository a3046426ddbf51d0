"""What is pruned stays zero in training, whatever the method, the optimiser and the form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_network import build_sample, build_tiny, engine_for

from medspark.data.batch import Batch
from medspark.errors import UsageError
from medspark.models.masks import magnitude_masks, prunable, zero_share
from medspark.train.engine import Engine
from medspark.train.prune.config import PruneConfig
from medspark.train.prune.pruner import Pruner

METHODS = ("rsr", "magnitude", "lasso", "noise", "hydra")
STEPS = 6


def pruning_engine(
    method: str, *, frozen: bool = True, pruned: bool = False, zeros: float = 0.0, **chosen: object
) -> Engine:
    """Return an engine that prunes the tiny network, ``zeros`` of which are zero already."""
    settings = {name: chosen.pop(name) for name in list(chosen) if name in PruneConfig.model_fields}
    config = PruneConfig.model_validate({"method": method, "sparsity": 0.6} | settings)
    model = build_tiny()
    model.batch_norm_frozen = frozen
    for name, mask in magnitude_masks(prunable(model), zeros).items():
        model.get_parameter(name).data *= mask
    chosen = {"batch_size": 10, "lr": 0.01, "weight_decay": 0.1} | chosen
    return engine_for(model.eval(), steps=STEPS, pruner=Pruner(config, pruned=pruned), **chosen)


def train(engine: Engine, steps: range) -> None:
    given = build_sample()
    images = (given.images * 255).to(torch.uint8)
    batch = Batch(images, given.labels, np.arange(10), 1.0, 10, 0, 0)
    for step in steps:
        engine.step(batch, step)


def deployed(engine: Engine) -> dict[str, torch.Tensor]:
    with engine.deployable() as model:
        return {name: weight.detach().clone() for name, weight in prunable(model).items()}


@settings(max_examples=12)
@given(st.sampled_from(METHODS), st.booleans(), st.booleans(), st.floats(0.05, 0.95))
def test_after_the_cut_exactly_the_share_is_zero_and_the_same_weights_at_every_step(
    method: str, frozen: bool, averaged: bool, sparsity: float
) -> None:
    ema = 0.9 if averaged else 0.0
    engine = pruning_engine(method, frozen=frozen, sparsity=sparsity, ema=ema)
    train(engine, range(3))
    first = {name: weight == 0 for name, weight in deployed(engine).items()}
    train(engine, range(3, STEPS))
    last = deployed(engine)

    assert engine.complete
    total = sum(weight.numel() for weight in last.values())
    assert zero_share(last) == round(sparsity * total) / total
    assert all(torch.equal(last[name] == 0, mask) for name, mask in first.items())
    assert zero_share(prunable(engine.model)) == zero_share(last)


@pytest.mark.parametrize("method", METHODS)
def test_only_magnitude_cuts_before_the_first_step(method: str) -> None:
    engine = pruning_engine(method)

    assert engine.complete == (method == "magnitude")
    train(engine, range(2))
    assert engine.complete == (method == "magnitude")
    train(engine, range(2, 3))
    assert engine.complete


@pytest.mark.parametrize("method", METHODS)
def test_every_training_ends_pruned_however_late_the_cut(method: str) -> None:
    engine = pruning_engine(method, cut_after=0.999)
    train(engine, range(STEPS))

    assert zero_share(deployed(engine)) == pytest.approx(0.6, abs=0.001)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("stopped", [2, 4])
def test_a_saved_pruning_goes_on_as_if_it_had_not_stopped(
    method: str, frozen: bool, stopped: int
) -> None:
    unbroken, resumed = (pruning_engine(method, frozen=frozen, ema=0.9) for _ in range(2))
    train(unbroken, range(stopped))
    resumed.restore({name: tensor.clone() for name, tensor in unbroken.tensors().items()})

    train(unbroken, range(stopped, STEPS))
    train(resumed, range(stopped, STEPS))

    left, right = unbroken.tensors(), resumed.tensors()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("method", METHODS)
def test_what_was_pruned_before_stays_so_in_every_method(method: str) -> None:
    engine = pruning_engine(method, pruned=True, zeros=0.3, sparsity=0.5)
    before = {name: weight == 0 for name, weight in prunable(engine.model).items()}
    train(engine, range(STEPS))

    for name, weight in deployed(engine).items():
        assert (weight[before[name]] == 0).all()
    assert zero_share(deployed(engine)) >= 0.499


def test_fine_tuning_keeps_the_zeros_of_a_pruned_network_and_no_others_do() -> None:
    shares = []
    for pruned in (True, False):
        model = build_tiny()
        for name, mask in magnitude_masks(prunable(model), 0.5).items():
            model.get_parameter(name).data *= mask
        engine = engine_for(
            model.eval(), steps=STEPS, pruner=Pruner(None, pruned=pruned), batch_size=10, lr=0.01
        )
        train(engine, range(STEPS))
        shares.append(zero_share(deployed(engine)))

    assert shares == [pytest.approx(0.5, abs=0.001), 0]


@pytest.mark.parametrize("method", [*METHODS, None])
def test_gradients_of_pruned_weights_do_not_count_in_the_norm_at_which_gradients_are_clipped(
    method: str | None,
) -> None:
    model = build_tiny()
    for name, mask in magnitude_masks(prunable(model), 0.6).items():
        model.get_parameter(name).data *= mask
    config = None if method is None else PruneConfig.model_validate({"method": method})
    pruner = Pruner(config, pruned=True)
    engine = engine_for(model.eval(), steps=STEPS, pruner=pruner, batch_size=10, lr=0.01)
    gradients = prunable(engine.model)
    for weight in gradients.values():
        weight.grad = torch.full_like(weight, 1e6)
    pruner.hold_back()

    for weight in gradients.values():
        if weight.grad is not None:  # hydra learns scores first
            assert torch.equal(weight.grad != 0, weight.detach() != 0)


def test_hydra_trains_scores_alone_until_the_cut_and_weights_alone_after_it() -> None:
    engine = pruning_engine("hydra")

    def parameters() -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in engine.model.named_parameters()}

    def moved(before: dict[str, torch.Tensor]) -> set[str]:
        return {name for name, p in parameters().items() if not torch.equal(p, before[name])}

    scores = {name for name in parameters() if name.endswith("score")}
    first = parameters()
    train(engine, range(2))
    assert moved(first) == scores
    train(engine, range(2, 3))
    cut = parameters()
    train(engine, range(3, STEPS))
    assert moved(cut) == set(cut) - scores


@pytest.mark.parametrize("method", ["rsr", "noise"])
def test_scales_of_the_noise_are_learnt_and_kept_apart_from_the_network(method: str) -> None:
    engine = pruning_engine(method)
    train(engine, range(STEPS))

    scales = engine.noise_scales()
    assert scales.keys() == {name.replace(".weight", ".noise") for name in deployed(engine)}
    assert all((scale != 0.25).all() for scale in scales.values())
    with engine.deployable() as model:
        assert not any("noise" in name for name in model.state_dict())


@pytest.mark.parametrize(("method", "shrinks"), [("lasso", True), ("rsr", True), ("noise", False)])
def test_only_the_lasso_makes_weights_zero_before_the_cut(method: str, shrinks: bool) -> None:
    engine = pruning_engine(method, lasso=3.0)
    train(engine, range(2))

    assert (zero_share(deployed(engine)) > 0) == shrinks


def test_scales_and_scores_have_no_weight_decay() -> None:
    for method in ("rsr", "hydra"):
        engine = pruning_engine(method)
        named = dict(engine.model.named_parameters())
        spared = {n for n in named if n.endswith(("noise", "score"))}
        for group in engine.optimiser.param_groups:
            for parameter in group["params"]:
                name = next(n for n, p in named.items() if p is parameter)
                assert name not in spared or group["weight_decay"] == 0


def test_a_layer_without_such_a_form_is_one_sentence() -> None:
    class Odd(torch.nn.Conv2d):
        pass

    model = build_tiny()
    model.backbone[0] = Odd(1, 8, 3, padding=1, bias=False)
    with pytest.raises(UsageError, match="method: hydra cannot prune this network: layer"):
        engine_for(model, pruner=Pruner(PruneConfig(method="hydra"), pruned=False))
