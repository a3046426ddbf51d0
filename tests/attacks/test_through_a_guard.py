"""Attacks that fool a network and its detector together: laws, costs, and what they find."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from medspark.attacks.components import Components
from medspark.attacks.evasion import Evasion, Watch
from medspark.attacks.leading_pgd import leading_pgd
from medspark.attacks.losses import correct
from medspark.attacks.orthogonal_pgd import orthogonal_pgd, without_part_along
from medspark.attacks.pgd import pgd
from medspark.attacks.threat import ThreatModel
from medspark.attacks.weighted_pgd import weighted_pgd

THREAT = ThreatModel(eps=0.2)
ATTACKS: dict[str, Callable[..., Tensor]] = {
    "project_classifier": partial(orthogonal_pgd, variant="project_classifier"),
    "project_detector": partial(orthogonal_pgd, variant="project_detector"),
    "selective": partial(orthogonal_pgd, variant="selective"),
    "weighted": weighted_pgd,
    "leading": leading_pgd,
}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


@pytest.fixture
def batch(digits) -> tuple[Tensor, Tensor]:
    return digits.test_images[:60], digits.test_labels[:60]


@pytest.fixture
def watch(plain_network: nn.Module) -> Watch:
    """A detector to which the small principal components of an image are suspicious."""

    def look(images: Tensor, _draw: int) -> tuple[Tensor, Tensor]:
        parts = Components.of(images.detach(), centred=False)
        rest = images - parts.projected(images, 4)
        return plain_network(images), 10 * rest.square().flatten(1).sum(1)

    return look


def evasions(watch: Watch, images: Tensor, labels: Tensor, limit: float) -> float:
    """Return the share of ``images`` that are wrong and less suspicious than ``limit``."""
    with torch.no_grad():
        logits, suspicion = watch(images, 0)
    return float((~correct(logits, labels) & (suspicion < limit)).float().mean())


@each_attack
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_stay_inside_the_threat_model(watch, batch, attack, norm) -> None:
    threat = ThreatModel(norm=norm, eps=0.1)

    found = attack(watch, *batch, threat=threat, steps=6)

    assert threat.holds(found, batch[0]).all()
    assert not torch.equal(found, batch[0])


@each_attack
def test_an_attack_of_nothing_returns_the_images(watch, batch, attack) -> None:
    found = attack(watch, *batch, threat=ThreatModel(eps=0), steps=6)

    assert torch.equal(found, batch[0])


@each_attack
def test_fewer_images_are_caught_than_by_plain_pgd(watch, batch, plain_network, attack) -> None:
    images, labels = batch
    limit = float(watch(images, 0)[1].median())
    plain = pgd(plain_network, images, labels, threat=THREAT, steps=20)

    found = attack(watch, images, labels, threat=THREAT, steps=20)

    assert evasions(watch, found, labels, limit) > evasions(watch, plain, labels, limit) + 0.1


class Counting(nn.Module):
    """Counts the images of forward and of backward passes through a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.passed = network, 0

    def forward(self, images: Tensor) -> Tensor:
        self.passed += len(images)
        logits: Tensor = self.network(images)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.passed += len(gradient)


def passes(network: nn.Module, attack: Callable[[nn.Module], object]) -> int:
    counting = Counting(network)
    attack(counting)
    return counting.passed


@pytest.mark.parametrize("variant", ["project_classifier", "project_detector", "selective"])
def test_orthogonal_pgd_costs_at_most_2_2_times_the_passes_of_pgd(
    plain_network, batch, variant
) -> None:
    plain = passes(plain_network, lambda m: pgd(m, *batch, threat=THREAT, steps=20))

    def attack(model: nn.Module) -> Tensor:
        def watch(images: Tensor, _: int) -> tuple[Tensor, Tensor]:
            logits = model(images)
            return logits, logits.square().mean(1)

        return orthogonal_pgd(watch, *batch, threat=THREAT, steps=20, variant=variant)

    assert plain == 40 * len(batch[0])
    assert passes(plain_network, attack) <= 2.2 * plain


def test_what_is_left_of_a_gradient_is_orthogonal_to_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient, other = torch.randn(2, 7, 3, 4, 4, generator=generator, dtype=torch.float64)

    left = without_part_along(gradient, other)

    assert torch.allclose((left * other).sum((1, 2, 3)), torch.zeros(7).double(), atol=1e-12)
    assert torch.allclose((gradient - left) / other, ((gradient - left) / other)[:, :1, :1, :1])
    assert torch.equal(without_part_along(gradient, 0 * other), gradient)


def test_each_step_of_an_attack_draws_anew(batch, plain_network) -> None:
    draws: list[int] = []

    def watch(images: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        draws.append(draw)
        return plain_network(images), images.flatten(1).mean(1)

    for attack in ATTACKS.values():
        draws.clear()
        attack(watch, *batch, threat=THREAT, steps=3)
        assert len(set(draws)) == len(draws) > 3


def test_the_least_suspicious_of_the_images_that_fool_the_model_is_kept() -> None:
    labels = torch.tensor([0, 0, 0])
    right, wrong = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    found = Evasion.begin(torch.zeros(3, 1, 1, 1))

    offers = [
        (1.0, [wrong, wrong, right], [5.0, 5.0, 0.0]),
        (2.0, [wrong, wrong, 2 * right], [6.0, 4.0, 0.0]),
        (3.0, [right, right, 0.5 * right], [0.0, 0.0, 9.0]),
    ]
    for value, logits, suspicion in offers:
        images = torch.full((3, 1, 1, 1), value)
        found.offer(images, torch.cat(logits), labels, torch.tensor(suspicion))

    assert found.images.flatten().tolist() == [1, 2, 3]
    assert found.suspicion.tolist() == [5, 4, torch.inf]


def test_a_leading_attack_changes_the_leading_components_only(watch, batch) -> None:
    images = 0.4 + 0.2 * batch[0]
    found = leading_pgd(
        watch, images, batch[1], threat=ThreatModel(eps=0.05), steps=6, shares=[0.25]
    )

    change = found - images
    inside = Components.of(images, centred=False).leading(change, 2)
    assert torch.allclose(inside, change, atol=1e-5)
    assert (change != 0).any()


def by_the_paper(variant: str, secure: bool, a: Tensor, b: Tensor) -> Tensor:
    """Return the step's direction; ``a`` raises the margin, and ``b`` the suspicion."""
    overlap = (a * b).sum()
    if variant == "project_classifier":
        return -b if secure else a - overlap / (b * b).sum() * b
    if variant == "project_detector":
        return -(b - overlap / (a * a).sum() * a) if secure else a
    return -b if secure else a


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("variant", ["project_classifier", "project_detector", "selective"])
def test_a_step_is_that_of_bryniarski_et_al(variant: str, secure: bool) -> None:
    a, b = torch.randn(2, 1, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    images = torch.full((1, 1, 4, 4), 0.5)
    lead = 1.0 if secure else -1.0

    def watch(x: Tensor, _: int) -> tuple[Tensor, Tensor]:
        margin = ((x - images) * a).sum().view(1, 1) + lead
        return torch.cat([torch.zeros(1, 1), margin], dim=1), (x * b).sum().view(1)

    stepped = []

    def seen(x: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        stepped.append(x.detach())
        return watch(x, draw)

    orthogonal_pgd(seen, images, torch.tensor([0]), threat=THREAT, steps=1, variant=variant,
                   step=0.01)  # fmt: skip

    expected = images + 0.01 * by_the_paper(variant, secure, a, b).sign()
    assert torch.allclose(stepped[-1], expected)
