"""Properties of FGSM and PGD."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from medspark.attacks.fgsm import fgsm
from medspark.attacks.gradient import input_gradient, zero_gradient
from medspark.attacks.losses import (
    correct,
    cross_entropy,
    dlr,
    margin,
    probabilities,
    rescaled,
)
from medspark.attacks.pgd import pgd
from medspark.attacks.threat import ThreatModel
from medspark.models.backbones import build
from medspark.models.config import ModelConfig

THREAT = ThreatModel(eps=0.1)


def attacked(name: str, model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    threat = ThreatModel(eps=eps)
    if name == "fgsm":
        return fgsm(model, images, labels, threat=threat)
    return pgd(model, images, labels, threat=threat, steps=10)


@pytest.fixture(scope="module")
def batch(digits) -> tuple[Tensor, Tensor]:
    return digits.test_images[:100], digits.test_labels[:100]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(correct(model(images), labels).float().mean())


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
@pytest.mark.parametrize("eps", [0.0039, 0.1, 64 / 255])
def test_attacked_images_stay_allowed(plain_network, batch, name: str, eps: float) -> None:
    images, labels = batch

    found = attacked(name, plain_network, images, labels, eps)

    assert ThreatModel(eps=eps).holds(found, images).all()


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_an_attack_of_nothing_returns_the_images_untouched(plain_network, batch, name) -> None:
    images, labels = batch

    assert torch.equal(attacked(name, plain_network, images, labels, 0.0), images)


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_accuracy_falls_with_eps(plain_network, batch, name: str) -> None:
    images, labels = batch

    found = [
        accuracy(plain_network, attacked(name, plain_network, images, labels, eps), labels)
        for eps in (0.0, 0.05, 0.1, 0.2)
    ]

    assert all(after <= before + 0.01 for before, after in pairwise(found))
    assert found[-1] < 0.5 * found[0]


def test_many_small_steps_are_worse_than_one(plain_network, batch) -> None:
    images, labels = batch

    one = accuracy(plain_network, attacked("fgsm", plain_network, images, labels, 0.1), labels)
    many = accuracy(plain_network, attacked("pgd", plain_network, images, labels, 0.1), labels)

    assert many <= one + 0.01


def test_stopping_when_fooled_gives_the_same_accuracy_for_less_work(plain_network, batch) -> None:
    images, labels = batch
    seen: list[int] = []
    counted = copy.deepcopy(plain_network)
    counted.register_forward_hook(lambda _model, inputs, _output: seen.append(len(inputs[0])))

    early = pgd(counted, images, labels, threat=THREAT, steps=20, stop_when_fooled=True)

    full = pgd(plain_network, images, labels, threat=THREAT, steps=20)
    assert accuracy(plain_network, early, labels) <= accuracy(plain_network, full, labels) + 0.01
    assert THREAT.holds(early, images).all()
    assert sum(seen) < 0.8 * 20 * len(images)


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_crafting_leaves_no_trace_in_the_model(name: str) -> None:
    model = build(ModelConfig(name="test_resnet"), num_classes=2, channels=1).eval()
    model.normalise.train()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]

    attacked(name, model, torch.rand(2, 1, 32, 32), torch.tensor([0, 1]), 0.01)

    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes


def test_clean_images_are_not_written_to(plain_network, batch) -> None:
    images, labels = batch
    before = images.clone()

    pgd(plain_network, images, labels, threat=THREAT, steps=2, start=images)

    assert torch.equal(images, before)
    assert not images.requires_grad


def test_mixed_precision_does_not_reach_the_attack(plain_network, batch) -> None:
    images, labels = batch
    expected = fgsm(plain_network, images, labels, threat=THREAT)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fgsm(plain_network, images, labels, threat=THREAT)

    assert torch.equal(found, expected)


def test_images_without_a_gradient_are_counted(plain_network, batch) -> None:
    images, labels = batch
    gradient, _ = input_gradient(plain_network, images, labels, loss=cross_entropy)
    gradient[0], gradient[1], gradient[2, 0, 0, 0] = 0, torch.nan, 0

    assert zero_gradient(gradient).nonzero().flatten().tolist() == [0, 1]


LOGITS = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 6.0]])


def test_the_margin_is_positive_exactly_where_the_network_errs() -> None:
    assert margin(LOGITS, torch.tensor([0, 1])).tolist() == [-2.0, 4.0]


def test_the_difference_of_logits_ratio_does_not_see_scale() -> None:
    labels = torch.tensor([0, 1])

    ratio = dlr(LOGITS, labels)

    torch.testing.assert_close(ratio, torch.tensor([-2 / 3, 4 / 6]))
    torch.testing.assert_close(dlr(50 * LOGITS, labels), ratio)


def test_with_two_classes_the_ratio_is_the_margin() -> None:
    logits, labels = LOGITS[:, :2], torch.tensor([0, 1])

    assert torch.equal(dlr(logits, labels), margin(logits, labels))


def test_rescaling_undoes_a_temperature() -> None:
    labels = torch.tensor([0, 1])
    loss = rescaled(cross_entropy)

    torch.testing.assert_close(loss(50 * LOGITS, labels), loss(LOGITS, labels))


def test_findings_are_attacked_one_against_the_others() -> None:
    logits, labels = torch.tensor([[2.0, -1.0], [2.0, -1.0]]), torch.tensor([[1, 0], [1, 1]])

    assert margin(logits, labels).tolist() == [-1.0, 1.0]
    assert correct(logits, labels).tolist() == [True, False]


def test_a_gradient_of_infinities_alone_is_none() -> None:
    gradient = torch.zeros(3, 1, 2, 2)
    gradient[0], gradient[1], gradient[2, 0, 0, 0] = torch.inf, -torch.inf, 1.0

    assert zero_gradient(gradient).tolist() == [True, True, False]


def test_gradients_are_those_of_each_image_by_itself(plain_network, batch) -> None:
    images, labels = batch[0][:5], batch[1][:5]
    together, _ = input_gradient(plain_network, images, labels, loss=cross_entropy)

    for i in range(5):
        alone, _ = input_gradient(
            plain_network, images[i : i + 1], labels[i : i + 1], loss=cross_entropy
        )
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-6)


def test_gradients_are_found_where_none_are_kept(plain_network, batch) -> None:
    images, labels = batch
    expected = fgsm(plain_network, images, labels, threat=THREAT)

    with torch.no_grad():
        assert torch.equal(fgsm(plain_network, images, labels, threat=THREAT), expected)


def test_the_ratio_divides_by_the_lead_over_the_third_and_not_the_last() -> None:
    logits = torch.tensor([[5.0, 4.0, 1.0, -9.0], [1.0, 3.0, 2.0, 0.0]])

    ratio = dlr(logits, torch.tensor([0, 2]))

    torch.testing.assert_close(ratio, torch.tensor([-1 / 4, 1 / 2]))


def test_the_loss_of_findings_is_their_sum_and_zero_is_no_finding() -> None:
    logits, labels = torch.tensor([[0.0, 2.0, -1.0]]), torch.tensor([[0, 1, 0]])
    each = [cross_entropy(logits[:, k : k + 1], labels[:, k : k + 1]) for k in range(3)]

    torch.testing.assert_close(cross_entropy(logits, labels), sum(each))
    assert correct(logits, labels).all()


def test_findings_are_rescaled_by_the_one_that_is_furthest_from_its_answer() -> None:
    logits, labels = torch.tensor([[4.0, -1.0, 2.0]]), torch.tensor([[0, 1, 0]])
    unit = logits / 4

    torch.testing.assert_close(rescaled(cross_entropy)(logits, labels), cross_entropy(unit, labels))


def test_probabilities_of_findings_keep_their_order_where_they_are_nearly_sure() -> None:
    logits = torch.tensor([[20.0], [25.0], [30.0]])

    likely = probabilities(logits, torch.ones(3, 1)).flatten()

    assert likely[0] < likely[1] < likely[2] < 1
