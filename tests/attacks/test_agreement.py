"""Agreement with foolbox, ART and torchattacks: the same images from the same inputs.

Each library is called through its own interface, if it is installed. The default set-up includes
foolbox and ART.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from medspark.attacks.fgsm import fgsm
from medspark.attacks.losses import correct
from medspark.attacks.pgd import pgd
from medspark.attacks.threat import ThreatModel
from medspark.models.backbones import build
from medspark.models.config import ModelConfig

# Steps of PGD by the budget, and how many.
STEP, STEPS = 0.25, 10
# ART adds the change to the image again, which rounds once more.
ROUNDED = 2**-23

Oracle = Callable[[nn.Module, Tensor, Tensor, float], Tensor]
Case = tuple[nn.Module, Tensor, Tensor]


def foolbox_fgsm(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    import foolbox

    oracle = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    return foolbox.attacks.FGSM()(oracle, images, labels, epsilons=eps)[0]


def foolbox_pgd(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    import foolbox

    oracle = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(rel_stepsize=STEP, steps=STEPS, random_start=False)
    return attack(oracle, images, labels, epsilons=eps)[0]


def _art_classifier(model: nn.Module, images: Tensor):
    from art.estimators.classification import PyTorchClassifier

    with torch.no_grad():
        classes = model(images[:1]).shape[1]
    return PyTorchClassifier(
        model=model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(images.shape[1:]),
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )


def art_fgsm(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    from art.attacks.evasion import FastGradientMethod

    attack = FastGradientMethod(_art_classifier(model, images), eps=eps, batch_size=100)
    return torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))


def art_pgd(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch

    attack = ProjectedGradientDescentPyTorch(
        _art_classifier(model, images), eps=eps, eps_step=STEP * eps, max_iter=STEPS,
        batch_size=100, verbose=False,
    )  # fmt: skip
    return torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))


def torchattacks_fgsm(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    import torchattacks

    return torchattacks.FGSM(model, eps=eps)(images, labels)


def torchattacks_pgd(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    import torchattacks

    attack = torchattacks.PGD(model, eps=eps, alpha=STEP * eps, steps=STEPS, random_start=False)
    return attack(images, labels)


ORACLES = {
    "fgsm": {"foolbox": foolbox_fgsm, "art": art_fgsm, "torchattacks": torchattacks_fgsm},
    "pgd": {"foolbox": foolbox_pgd, "art": art_pgd, "torchattacks": torchattacks_pgd},
}


def each_library(attack: str) -> pytest.MarkDecorator:
    """Run a test with ``attack`` of every library that is installed."""
    missing = {name: importlib.util.find_spec(name) is None for name in ORACLES[attack]}
    return pytest.mark.parametrize(
        "theirs",
        [
            pytest.param(
                oracle,
                id=name,
                marks=pytest.mark.skipif(missing[name], reason=f"{name} is not installed"),
            )
            for name, oracle in ORACLES[attack].items()
        ],
    )


@pytest.fixture(params=["digits", "timm"])
def case(request: pytest.FixtureRequest, digits, plain_network) -> Case:
    """A trained network of ten classes, and a medspark Classifier with normalisation inside."""
    if request.param == "digits":
        return plain_network, digits.test_images[:100], digits.test_labels[:100]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(ModelConfig(name="test_resnet"), num_classes=2, channels=1).eval()
        images = torch.randint(0, 256, (20, 1, 32, 32)) / 255
    return model, images, torch.arange(20) % 2


@each_library("fgsm")
def test_fgsm_is_exactly_theirs(digits, plain_network, theirs: Oracle) -> None:
    # Sixteenths plus eighths are exact: no library's order of sums can round.
    images, labels, eps = digits.test_images[:100], digits.test_labels[:100], 1 / 8

    ours = fgsm(plain_network, images, labels, threat=ThreatModel(eps=eps))

    assert torch.equal(ours, theirs(plain_network, images, labels, eps))


@each_library("fgsm")
def test_fgsm_at_a_real_budget_is_theirs_but_for_the_last_bit(case: Case, theirs: Oracle) -> None:
    model, images, labels = case

    ours = fgsm(model, images, labels, threat=ThreatModel(eps=2 / 255))

    found = theirs(model, images, labels, 2 / 255)
    assert (ours - found).abs().max() <= (ROUNDED if theirs is art_fgsm else 0)


@each_library("pgd")
def test_pgd_from_the_image_is_theirs(digits, plain_network, theirs: Oracle) -> None:
    images, labels, eps = digits.test_images[:100], digits.test_labels[:100], 1 / 8

    ours = pgd(
        plain_network, images, labels, threat=ThreatModel(eps=eps), steps=STEPS, step=STEP * eps
    )

    torch.testing.assert_close(ours, theirs(plain_network, images, labels, eps), rtol=0, atol=1e-6)


def test_pgd_from_the_same_random_start_is_that_of_foolbox(digits, plain_network) -> None:
    import eagerpy
    import foolbox

    images, labels, threat = (
        digits.test_images[:100],
        digits.test_labels[:100],
        ThreatModel(eps=0.1),
    )
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    start = threat.random_start(images, noise)

    class Started(foolbox.attacks.LinfPGD):
        def get_random_start(self, x0, epsilon):
            return eagerpy.astensor(start)

    oracle = foolbox.PyTorchModel(plain_network, bounds=(0, 1), device="cpu")
    attack = Started(abs_stepsize=0.02, steps=STEPS)
    theirs, *_ = attack(oracle, images, labels, epsilons=threat.eps)

    ours = pgd(plain_network, images, labels, threat=threat, steps=STEPS, step=0.02, start=start)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_pgd_in_l2_is_as_strong_as_that_of_foolbox(digits, plain_network) -> None:
    import foolbox

    images, labels = digits.test_images[:100], digits.test_labels[:100]
    threat = ThreatModel(norm="l2", eps=0.1)
    oracle = foolbox.PyTorchModel(plain_network, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.L2PGD(rel_stepsize=STEP, steps=STEPS, random_start=False)

    theirs, *_ = attack(oracle, images, labels, epsilons=threat.radius(images))

    ours = pgd(plain_network, images, labels, threat=threat, steps=STEPS)
    held = [correct(plain_network(found), labels).float().mean() for found in (ours, theirs)]
    assert held[0] <= held[1] + 0.01
