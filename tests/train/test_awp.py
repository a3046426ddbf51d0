"""Weights move up the loss for the passes of a step, cost no pass, and come back bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as given_any
from hypothesis import settings
from hypothesis import strategies as st
from tiny_network import build_sample, build_tiny, engine_for
from torch import Tensor, nn

from medspark.data.batch import Batch
from medspark.models.classifier import Classifier
from medspark.seeding import derive
from medspark.train.adversarial import MODES, take_step
from medspark.train.awp import WeightPerturbation
from medspark.train.config import AdversarialConfig, DistillConfig
from medspark.train.distill import distillation_rule
from medspark.train.engine import Engine
from medspark.train.learner import Learner, Sample
from medspark.train.objective import CrossEntropy
from medspark.train.prune.config import PruneConfig
from medspark.train.prune.pruner import Pruner

ATTACKING = sorted(set(MODES) - {"standard"})
WEIGHTS = {"backbone.0.weight", "backbone.3.weight", "backbone.8.weight"}
Tensors = dict[str, Tensor]


def batch_for(step: int = 0) -> Batch:
    given = build_sample()
    images = (given.images * 255).to(torch.uint8)
    return Batch(images, given.labels, np.arange(10) + 10 * step, 1.0, 10, 0, step)


def perturbed(**chosen: Any) -> tuple[nn.Module, WeightPerturbation]:
    """Return a network with a remembered gradient, and what moves it."""
    model = build_tiny()
    perturbation = WeightPerturbation(model, **{"gamma": 0.01, "begins": 0} | chosen)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    perturbation.remember(0)
    return model, perturbation


def copied(model: nn.Module) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@settings(max_examples=20)
@given_any(st.floats(1e-4, 0.5))
def test_every_weight_tensor_moves_by_its_share_of_its_norm_along_the_gradient(gamma: float):
    model, perturbation = perturbed(gamma=gamma)
    before, slopes = copied(model), {n: p.grad.clone() for n, p in model.named_parameters()}

    with perturbation.moved(1):
        moved = copied(model)

    for name, weight in before.items():
        if name not in WEIGHTS:
            assert torch.equal(moved[name], weight)
            continue
        expected = gamma * weight.norm() / slopes[name].norm() * slopes[name]
        torch.testing.assert_close(moved[name] - weight, expected, rtol=1e-3, atol=1e-6)


@settings(max_examples=20)
@given_any(st.floats(1e-4, 0.9), st.booleans())
def test_the_weights_come_back_bit_for_bit_even_after_an_error(gamma: float, fails: bool):
    model, perturbation = perturbed(gamma=gamma)
    before = copied(model)

    try:
        with perturbation.moved(1):
            assert not torch.equal(model.backbone[0].weight, before["backbone.0.weight"])
            assert not fails
    except AssertionError:
        assert fails

    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_gradient_that_is_not_finite_moves_nothing_there():
    model = build_tiny()
    perturbation = WeightPerturbation(model, gamma=0.01, begins=0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.backbone[0].weight.grad[0] = torch.nan
    model.backbone[3].weight.grad[:] = torch.inf
    perturbation.remember(0)
    before = copied(model)

    with perturbation.moved(1):
        moved = {name: tensor - before[name] for name, tensor in copied(model).items()}

    assert not moved["backbone.0.weight"][0].any()
    assert moved["backbone.0.weight"][1:].all()
    assert not moved["backbone.3.weight"].any()


@pytest.mark.parametrize(("keep", "zeros"), [(True, 7), (False, 0)])
def test_a_pruned_weight_stays_zero(keep: bool, zeros: int):
    model = build_tiny()
    with torch.no_grad():
        model.backbone[0].weight.view(-1)[:7] = 0
    perturbation = WeightPerturbation(model, gamma=0.01, begins=0, keep_zeros=keep)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    perturbation.remember(0)

    with perturbation.moved(1):
        assert int((model.backbone[0].weight == 0).sum()) == zeros


class Passes:
    """Counts passes through a network, and keeps its weights at each."""

    def __init__(self, engine: Engine) -> None:
        self.forward = self.backward = 0
        self.weights: list[Tensor] = []
        engine.model.register_forward_hook(self._count)

    def _count(self, module: Any, _: object, output: Tensor) -> None:
        self.forward += 1
        self.weights.append(module.backbone[3].weight.detach().clone())
        if output.requires_grad:
            output.register_hook(self._count_backward)

    def _count_backward(self, _: Tensor) -> None:
        self.backward += 1


@pytest.mark.parametrize("mode", ATTACKING)
def test_a_step_costs_no_pass_more_and_takes_all_of_them_at_moved_weights(mode: str):
    counted = []
    for gamma in (0.0, 0.05):
        chosen = {"inner_steps": 2, "replays": 1, "awp": gamma, "awp_after": 0.0}
        engine = engine_for(build_tiny().eval(), mode=mode, **chosen)
        engine.step(batch_for(), 0)
        passes, before = Passes(engine), engine.model.backbone[3].weight.detach().clone()
        engine.step(batch_for(1), 1)
        counted.append((passes.forward, passes.backward))
        assert {torch.equal(seen, before) for seen in passes.weights} == {gamma == 0}

    assert counted[0] == counted[1]


def gradients_of(engine: Engine) -> list[Tensors]:
    """Return a list to which every update adds its gradients."""
    kept: list[Tensors] = []

    def keep(*_: object) -> None:
        kept.append({n: p.grad.clone() for n, p in engine.model.named_parameters()})

    engine.optimiser.register_step_pre_hook(keep)
    return kept


@pytest.mark.parametrize("mode", ["fused_noise", "pgd", "trades", "ikl"])
def test_the_gradient_of_a_step_is_the_one_at_the_weights_moved_up_the_loss(mode: str):
    chosen = {"mode": mode, "inner_steps": 2}
    network = build_tiny().eval()
    network.batch_norm_frozen = True
    engine = engine_for(network, awp=0.05, awp_after=0.0, clip_grad=0.0, eps_warmup=0.0, **chosen)
    kept = gradients_of(engine)
    engine.step(batch_for(), 0)
    twin = build_twin(engine)
    engine.step(batch_for(), 1)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if parameter.ndim > 1:
                slope = kept[0][name]
                parameter += 0.05 * parameter.norm() / slope.norm() * slope
    config = AdversarialConfig.model_validate(chosen)
    images = (batch_for().images / 255).float()
    sample = replace(build_sample(), images=images, key=derive(0, "noise", 1))

    take_step(Learner(twin, CrossEntropy(), config), sample)

    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(kept[1][name], parameter.grad, rtol=1e-3, atol=1e-5)


def build_twin(engine: Engine) -> Classifier:
    """Return a copy of the network in training."""
    return copy.deepcopy(engine.model).train()


def test_it_begins_after_its_share_of_the_steps():
    trained = []
    for gamma in (0.0, 0.05):
        engine = engine_for(build_tiny().eval(), mode="fused", awp=gamma, awp_after=0.5)
        weights = []
        for step in range(4):
            engine.step(batch_for(step), step)
            weights.append(copied(engine.model)["backbone.3.weight"])
        trained.append(weights)

    same = [torch.equal(plain, moved) for plain, moved in zip(*trained, strict=True)]
    assert same == [True, True, False, False]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ATTACKING)
def test_a_saved_engine_goes_on_as_if_it_had_not_stopped(mode: str, precision: str):
    chosen = {"inner_steps": 1, "replays": 2, "awp": 0.05, "awp_after": 0.2, "ema": 0.5}
    engines = [
        engine_for(build_tiny().eval(), mode=mode, precision=precision, **chosen) for _ in range(2)
    ]
    unbroken, resumed = engines
    for step in range(2):
        unbroken.step(batch_for(step), step)

    resumed.restore({name: tensor.clone() for name, tensor in unbroken.tensors().items()})

    for step in (2, 3):
        for engine in engines:
            engine.step(batch_for(step), step)
    left, right = (engine.tensors() for engine in engines)
    assert left.keys() == right.keys()
    assert any(name.startswith("awp/") for name in left)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("method", ["ard", "rslad"])
def test_a_student_that_learns_from_attacked_images_moves_too(method: str):
    teacher = build_tiny(seed=1).eval()
    rule = distillation_rule(
        DistillConfig.model_validate({"teacher": "unused", "method": method}), teacher
    )
    trained = []
    for gamma in (0.0, 0.05):
        engine = engine_for(
            build_tiny().eval(), step_rule=rule, awp=gamma, awp_after=0.0, inner_steps=1
        )
        for step in range(2):
            engine.step(batch_for(step), step)
        trained.append(copied(engine.model)["backbone.3.weight"])

    assert not torch.equal(*trained)


@pytest.mark.parametrize("method", ["magnitude", "lasso", "rsr", "hydra"])
def test_a_pruned_network_is_pruned_in_every_pass_and_afterwards(method: str):
    pruner = Pruner(PruneConfig.model_validate({"method": method, "sparsity": 0.5}), pruned=False)
    engine = engine_for(
        build_tiny().eval(), mode="fused", pruner=pruner, awp=0.05, awp_after=0.0, steps=6
    )
    for step in range(6):
        if step == 5:
            passes = Passes(engine)
        engine.step(batch_for(step), step)

    zeros = [float((seen == 0).float().mean()) for seen in passes.weights]
    assert min(zeros) > 0.2
    with engine.deployable() as model:
        assert float((model.backbone[3].weight == 0).float().mean()) > 0.2


@pytest.mark.parametrize("gamma", [0.0, 0.05])
def test_the_loss_is_higher_at_the_moved_weights_of_the_same_images(
    gamma: float, sample: Callable[..., Sample]
):
    given, model = sample(), build_tiny().double().eval()
    perturbation = WeightPerturbation(model, gamma=gamma, begins=0)
    learner = Learner(model, CrossEntropy(), AdversarialConfig(mode="pgd"))
    stats = take_step(learner, given)
    perturbation.remember(0)

    with perturbation.moved(1), torch.no_grad():
        moved = CrossEntropy()(model(stats.attacked), given.labels)

    assert (float(moved) > float(stats.loss) + 1e-6) == (gamma > 0)
