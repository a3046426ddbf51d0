"""A resident network in its faster form: the same gradients, parameters and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from torch import Tensor, nn

from medspark.attacks.threat import ThreatModel
from medspark.federate.client import Task, train_client
from medspark.federate.resident import Resident
from medspark.federate.weights import NormPolicy, pack
from medspark.models.classifier import Classifier, batch_norms
from medspark.train.adversarial import MODES, take_step
from medspark.train.config import AdversarialConfig
from medspark.train.learner import Learner, Sample
from medspark.train.objective import CrossEntropy

SHAPE = (1, 12, 12)


def network(*, bias: bool = True, affine: bool = True) -> Classifier:
    """Return a network of two folded convolutions and a batch norm that cannot be folded."""
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=bias),
        nn.BatchNorm2d(8, affine=affine),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 64, 3, stride=2, padding=1, bias=bias),
        nn.BatchNorm2d(64, affine=affine),
        nn.ReLU(),
        nn.Conv2d(64, 256, 1, bias=bias),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(256, 2),
    )
    for layer in batch_norms(backbone):
        for tensor in (*layer.parameters(), layer.running_mean, layer.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
    return Classifier(backbone, architecture="tiny", mean=[0.4], std=[0.2])


def gradients(resident: Resident, mode: Any) -> dict[str, Tensor | None]:
    """Return the gradients of the network's own parameters after a step."""
    resident.trained.eval()
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(6, *SHAPE, generator=draw, dtype=torch.float64)
    config = AdversarialConfig(mode=mode, inner_steps=2)
    sample = Sample(images, torch.arange(6) % 2, np.arange(6), 1.0, ThreatModel(eps=0.1), 3)
    resident.fold()
    take_step(Learner(resident.trained, CrossEntropy(), config), sample)
    resident.pull_back()
    return {name: parameter.grad for name, parameter in resident.own.named_parameters()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("parts", [{}, {"bias": False}, {"affine": False}], ids=str)
def test_the_faster_form_has_the_gradients_of_the_networks_own_parameters(mode: Any, parts: Any):
    fast = Resident.prepared(network(**parts).double(), SHAPE, small.local(batch_norm="frozen"))

    found = gradients(fast, mode)

    assert len(fast.folded) == 2
    expected = gradients(Resident.of(network(**parts).double()), mode)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_parameters_that_are_not_trained_get_no_gradient():
    model = network().double()
    model.backbone[1].requires_grad_(False)
    model.backbone[4].weight.requires_grad_(False)

    found = gradients(Resident.prepared(model, SHAPE, small.local()), "fused_noise")

    untrained = {name for name, gradient in found.items() if gradient is None}
    assert untrained == {"backbone.1.weight", "backbone.1.bias", "backbone.4.weight"}


def test_gradients_are_laid_out_as_their_parameters_for_the_fused_optimiser():
    fast = Resident.prepared(network().double(), SHAPE, small.local(batch_norm="frozen"))
    for _, _, folded in fast.folded:
        folded.weight.data = folded.weight.data.contiguous()

    gradients(fast, "fused_noise")

    for parameter in fast.learning:
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write(tmp_path_factory.mktemp("prepared") / "shards")


ADAMW = {"optimiser": "adamw", "lr": 1e-3}


# Under average and local a convolution's bias has no gradient but rounding, which AdamW enlarges.
@pytest.mark.parametrize(
    ("policy", "optimiser"),
    [
        *((policy, {}) for policy in ("average", "local", "frozen", "reestimate")),
        *((policy, ADAMW) for policy in ("frozen", "reestimate")),
    ],
)
def test_a_prepared_network_answers_as_the_plain_one_but_for_rounding(
    folder: Path, policy: Any, optimiser: dict[str, Any]
):
    config = small.local("fused_noise", batch_norm=policy, epochs=2, **optimiser)
    rows, task = small.rows_of(folder), Task(pack(network(), policy), seed=1)
    fast = Resident.prepared(network(), SHAPE, config)

    first, again = (train_client(fast, rows, task, config) for _ in range(2))

    plain = train_client(network(), rows, task, config)
    assert np.array_equal(first.weights, again.weights)
    moved = np.abs(plain.weights - task.weights).max()
    assert np.abs(first.weights - plain.weights).max() < 1e-3 * moved
    assert first.loss == pytest.approx(plain.loss, rel=1e-3)


@pytest.mark.parametrize("policy", ["average", "frozen"])
def test_layers_are_replaced_by_faster_ones_and_keep_their_names(policy: NormPolicy):
    fast = Resident.prepared(network(), SHAPE, small.local(batch_norm=policy))

    kinds = {type(module).__name__ for module in fast.trained.modules()}
    assert "MatrixConv2d" in kinds
    assert fast.own.state_dict().keys() == network().state_dict().keys()
    assert len(fast.folded) == (2 if policy == "frozen" else 0)
