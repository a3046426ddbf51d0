"""Learning rates and decay per parameter, clipping, and the moving average."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from medspark.models.backbones import build
from medspark.models.classifier import Classifier
from medspark.models.config import ModelConfig
from medspark.train.config import TrainConfig
from medspark.train.optimise import Average, Descent, adamw, clip_gradients, set_rate


def network(name: str = "test_efficientnet") -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(ModelConfig(name=name), num_classes=2, channels=1)


def shrunk(model: nn.Module, *, rate: float, **chosen: float) -> dict[str, float]:
    """Return by what factor a step without any gradient shrinks each parameter that it can."""
    optimiser = adamw(model, TrainConfig.model_validate(chosen))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    set_rate(optimiser, rate)
    optimiser.step()
    return {name: float(p.detach().mean()) for name, p in model.named_parameters()}


def test_weights_decay_and_norms_and_biases_do_not() -> None:
    factors = shrunk(network(), rate=0.5, weight_decay=0.1)

    kept = {name for name, factor in factors.items() if factor == 1}
    assert {name for name in factors if ".bn" in name or name.endswith("bias")} == kept
    left = [factors[name] for name in factors.keys() - kept]
    assert left == pytest.approx([1 - 0.5 * 0.1] * len(left))


def rates(name: str, layer_decay: float) -> dict[str, float]:
    """Return the rate of each parameter of a network, 1 at its head."""
    model = network(name)
    optimiser = adamw(model, TrainConfig(layer_decay=layer_decay))
    set_rate(optimiser, 1.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: g["lr"] for g in optimiser.param_groups for p in g["params"]}
    assert found.keys() == set(names.values())
    return found


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
def test_the_rate_falls_from_the_head_down_stage_by_stage(name: str) -> None:
    found = rates(name, 0.5)

    of_stage = {
        stage: {rate for name, rate in found.items() if f".{stage}." in name}
        for stage in ("blocks.0", "blocks.1", "blocks.2", "layer1", "layer2", "layer3")
    }
    stages = [rates for rates in of_stage.values() if rates]
    falling = list(found.values())
    assert falling == sorted(falling)  # in the order in which the network defines its layers
    assert all(found[f"backbone.{head}"] == 1 for head in head_of(name))
    assert falling[0] < 0.5**3
    if name == "test_efficientnet":
        assert all(len(rates) == 1 for rates in stages)
        assert sum(stages[1]) == 2 * sum(stages[0])


def head_of(name: str) -> tuple[str, str]:
    head = "classifier" if name == "test_efficientnet" else "fc"
    return f"{head}.weight", f"{head}.bias"


def test_without_decay_of_the_rate_all_move_alike() -> None:
    assert set(rates("test_efficientnet", 1.0).values()) == {1.0}


norms = st.floats(0.01, 100)


@given(norms, st.just(0.0) | norms)
def test_a_gradient_is_cut_to_the_largest_norm_and_keeps_its_direction(
    norm: float, largest: float
) -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter()]
    whole = torch.linspace(-1, 2, 7)
    whole = whole * norm / whole.norm()
    parameters[0].grad, parameters[1].grad = whole[:3].clone(), whole[3:].view(2, 2).clone()

    told = clip_gradients(parameters, largest)

    left = torch.cat([p.grad.flatten() for p in parameters[:2]])
    factor = min(1.0, largest / norm) if largest > 0 else 1.0
    assert told == pytest.approx(norm, rel=1e-5)
    torch.testing.assert_close(left, factor * whole, rtol=1e-4, atol=1e-6)


@given(st.floats(0, 0.999), st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_the_average_forgets_the_first_weights_soon_and_later_as_slowly_as_it_is_told(
    decay: float, weights: list[float]
) -> None:
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(7.0)
    average, expected = Average(model, decay), 7.0

    for step, weight in enumerate(weights):
        model.weight.data.fill_(weight)
        average.update(model, step)
        kept = min(decay, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * weight

    assert float(average.values["weight"]) == pytest.approx(expected)


def test_swapping_twice_is_as_if_never() -> None:
    model = nn.Linear(2, 2)
    average = Average(model, 0.9)
    before = model.weight.detach().clone()
    average.values["weight"].add_(1)

    average.swap(model)
    assert torch.equal(model.weight, before + 1)
    average.swap(model)

    assert torch.equal(model.weight, before)
    assert torch.equal(average.values["weight"], before + 1)


@given(st.sampled_from([0.0, 0.9]), st.sampled_from([0.0, 0.01]), st.integers(0, 2**31))
def test_descent_is_torchs_sgd_bit_for_bit(momentum: float, decay: float, seed: int) -> None:
    torch.manual_seed(seed)
    ours, theirs = (nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    theirs[0].bias.requires_grad_(False)
    settings = {"momentum": momentum, "weight_decay": decay}
    descent = Descent(ours.parameters(), rate=0.1, **settings)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, **settings)

    for _ in range(3):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn_like(other) if other.requires_grad else None
            other.grad = mine.grad
        descent.step()
        sgd.step()

    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
