"""FGSM and PGD on a network whose gradient is known: where each step starts, goes and ends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from medspark.attacks.config import Effort
from medspark.attacks.fgsm import fgsm, one_step
from medspark.attacks.keyed_random import KeyedRandom
from medspark.attacks.losses import correct, cross_entropy, margin
from medspark.attacks.pgd import pgd
from medspark.attacks.suite import attacks_by_name
from medspark.attacks.threat import ThreatModel

SHAPE = (4, 1, 3, 3)
LABELS = torch.zeros(4, dtype=torch.long)


class Flat(nn.Module):
    """A network of two classes with logits linear in ``slope``, which records its inputs."""

    def __init__(self, slope: Tensor, *, bias: float = 0.0, square: bool = False) -> None:
        super().__init__()
        self.slope, self.bias, self.square = slope.double(), bias, square
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach().clone())
        shown = (images - 0.5) ** 2 if self.square else images - 0.5
        sum_ = (self.slope * shown).flatten(1).sum(1)
        return torch.stack([-sum_ + self.bias, sum_], dim=1)


def numbers(seed: int, low: float, high: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(SHAPE, generator=generator, dtype=torch.float64)


def flat(seed: int = 0, **chosen: object) -> Flat:
    slope = numbers(seed, 0.5, 1)[:1] * numbers(seed + 1, -1, 1)[:1].sign()
    return Flat(slope, **chosen)


budgets = st.floats(0.001, 0.25)
seeds = st.integers(0, 1000)


@given(budgets, st.none() | st.floats(0.001, 1), seeds)
def test_fgsm_goes_as_far_as_it_is_told_by_default_to_the_edge_of_the_ball(
    eps: float, step: float | None, seed: int
) -> None:
    network, images = flat(seed), numbers(seed, 0.4, 0.6)

    found = fgsm(network, images, LABELS, threat=ThreatModel(eps=eps), step=step)

    length = min(eps, eps if step is None else step)
    torch.testing.assert_close(found, images + length * network.slope.sign())


@given(budgets, st.floats(0.001, 1), seeds)
def test_from_another_start_the_ball_is_still_around_the_image(
    eps: float, step: float, seed: int
) -> None:
    network, images = flat(seed), numbers(seed, 0.4, 0.6)
    start = images + eps * numbers(seed + 2, -1, 1)
    moved = start + step * network.slope.sign()

    found = fgsm(network, images, LABELS, threat=ThreatModel(eps=eps), step=step, start=start)

    expected = moved.clamp(0, 1).maximum(images - eps).minimum(images + eps)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(network.seen[0], start)


def test_the_gradient_is_taken_where_the_step_begins() -> None:
    network = Flat(torch.ones(SHAPE), square=True)
    images, start = torch.full(SHAPE, 0.4).double(), torch.full(SHAPE, 0.6).double()
    threat = ThreatModel(eps=0.25)

    from_image = fgsm(network, images, LABELS, threat=threat, step=0.05)
    from_start = fgsm(network, images, LABELS, threat=threat, step=0.05, start=start)

    torch.testing.assert_close(from_image, images - 0.05)
    torch.testing.assert_close(from_start, start + 0.05)


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_the_loss_that_is_asked_for_is_driven_up(attack) -> None:
    def liked(logits: Tensor, labels: Tensor) -> Tensor:
        return -cross_entropy(logits, labels)

    network, images = flat(), numbers(0, 0.4, 0.6)
    more = {"steps": 10} if attack is pgd else {}

    up, down = (
        attack(network, images, LABELS, threat=ThreatModel(eps=0.1), loss=loss, **more) - images
        for loss in (cross_entropy, liked)
    )

    torch.testing.assert_close(up, 0.1 * network.slope.sign().expand(SHAPE))
    torch.testing.assert_close(down, -up)


@given(budgets, st.integers(1, 40), seeds)
def test_pgd_takes_the_steps_that_it_is_given_of_a_quarter_of_the_budget_or_enough_to_cross(
    eps: float, steps: int, seed: int
) -> None:
    network, images = flat(seed), numbers(seed, 0.4, 0.6)
    start = images - eps * network.slope.sign()

    found = pgd(network, images, LABELS, threat=ThreatModel(eps=eps), steps=steps, start=start)

    assert len(network.seen) == steps
    torch.testing.assert_close(network.seen[0], start)
    length = min(2.0, max(0.25, 2.5 / steps)) * eps
    after = network.seen[1] if steps > 1 else found
    torch.testing.assert_close(after - start, length * network.slope.sign().expand(SHAPE))


@given(budgets, st.floats(0.01, 0.4), st.integers(1, 9), seeds)
def test_pgd_with_a_step_of_its_own_ends_where_that_many_steps_lead(
    eps: float, share: float, steps: int, seed: int
) -> None:
    network, images = flat(seed), numbers(seed, 0.4, 0.6)

    found = pgd(network, images, LABELS, threat=ThreatModel(eps=eps), steps=steps, step=share * eps)

    length = min(1.0, share * steps) * eps
    torch.testing.assert_close(found - images, length * network.slope.sign().expand(SHAPE))


def test_a_budget_of_nothing_asks_the_network_nothing() -> None:
    network, images = flat(), numbers(0, 0, 1)

    assert torch.equal(pgd(network, images, LABELS, threat=ThreatModel(eps=0), steps=5), images)
    assert network.seen == []


@given(st.integers(1, 12), seeds)
def test_stopping_leaves_every_image_where_it_first_fools_and_goes_on_with_the_others(
    steps: int, seed: int
) -> None:
    network, images = flat(seed, bias=0.4), numbers(seed, 0, 1)
    threat = ThreatModel(eps=0.2)

    found = pgd(network, images, LABELS, threat=threat, steps=steps, stop_when_fooled=True)

    for image, end in zip(images.split(1), found.split(1), strict=True):
        x = image
        for _ in range(steps):
            if not correct(network(x), LABELS[:1]):
                break
            x = pgd(
                network, image, LABELS[:1],
                threat=threat, steps=1, start=x, step=0.2 * max(0.25, 2.5 / steps),
            )  # fmt: skip
        torch.testing.assert_close(end, x)


def test_one_step_begins_at_the_image_where_no_start_is_given() -> None:
    images, threat = numbers(0, 0.4, 0.6), ThreatModel(eps=0.1)

    found = one_step(images, -torch.ones(SHAPE).double(), threat=threat)

    torch.testing.assert_close(found, images - 0.1)


def starts(restarts: int, images: Tensor, rng: KeyedRandom, **chosen: float) -> list[Tensor]:
    """Return where PGD starts on a network that it never fools."""
    network = flat(**{"bias": 1e3} | chosen)
    attack = attacks_by_name(["pgd_margin"], Effort(steps=2, restarts=restarts))["pgd_margin"]
    labels = LABELS[: len(images)]
    attack(network, images, labels, ThreatModel(eps=0.1), rng)
    # Two steps a climb, and after each a look at what is left, but for the last.
    return network.seen[::3]


def test_every_restart_starts_elsewhere_in_the_ball() -> None:
    images = numbers(0, 0.4, 0.6)

    begun = starts(3, images, KeyedRandom.for_whole(images))

    assert len(begun) == 3
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (begun[first] - begun[second]).abs().mean() > 0.01
    assert all((((x - images).abs() > 0) & ((x - images).abs() <= 0.1)).all() for x in begun)


def test_an_image_starts_alike_in_any_batch_at_every_restart() -> None:
    images = numbers(0, 0.4, 0.6)
    rng, chosen = KeyedRandom(3, torch.arange(4) + 7), torch.tensor([3, 1])

    whole, part = starts(3, images, rng), starts(3, images[chosen], rng.of(chosen))

    for together, alone in zip(whole, part, strict=True):
        assert torch.equal(together[chosen], alone)


@pytest.mark.parametrize(
    ("name", "steps", "passes"),
    [
        ("fgsm", 7, 1),
        ("pgd", 7, 7),
        ("pgd_margin", 7, 7),
        ("apgd_ce", 2, 11),
        ("apgd_dlr", 2, 11),
        ("deepfool", 7, 50),
        ("cw", 7, 600),
    ],
)
def test_an_attack_asks_for_as_many_gradients_as_its_effort_says(
    name: str, steps: int, passes: int
) -> None:
    network, images = flat(bias=1e3), numbers(0, 0.4, 0.6)
    effort = Effort(steps=steps)

    attacks_by_name([name], effort)[name](
        network, images, LABELS, ThreatModel(eps=0.1), KeyedRandom.for_whole(images)
    )

    assert len(network.seen) == passes
    assert effort.steps_of(name) in (passes, passes - 1)  # APGD looks at its start as well


def test_the_named_attacks_climb_the_losses_of_their_names() -> None:
    # The cross-entropy of such a confident network rounds to zero; its margin does not.
    network, images = flat(bias=1e3), numbers(0, 0.4, 0.6)
    suite = attacks_by_name(["pgd", "pgd_margin", "pgd_rescaled"], Effort(steps=10))

    ends = {
        name: attack(network, images, LABELS, ThreatModel(eps=0.1), KeyedRandom.for_whole(images))
        for name, attack in suite.items()
    }

    edge = (images + 0.1 * network.slope.sign()).expand(SHAPE)
    assert not torch.allclose(ends["pgd"], edge)
    torch.testing.assert_close(ends["pgd_margin"], edge)
    torch.testing.assert_close(ends["pgd_rescaled"], edge)


def test_rescaling_keeps_the_direction_of_the_gradient() -> None:
    from medspark.attacks.losses import rescaled

    logits = torch.tensor([[8.0, 1.0, 5.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(rescaled(margin)(logits, torch.tensor([0])).sum(), logits)

    torch.testing.assert_close(slope, torch.tensor([[-1.0, 0.0, 1.0]]) / 7)
