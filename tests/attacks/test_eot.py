"""EOT-PGD: PGD where nothing is random, and stronger than PGD where weights are noisy."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medspark.attacks.eot import eot_pgd
from medspark.attacks.losses import cross_entropy
from medspark.attacks.pgd import pgd
from medspark.attacks.threat import ThreatModel
from medspark.models.noisy import add_noise

IMAGES = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 3


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))


@settings(max_examples=10)
@given(st.floats(0, 0.2), st.integers(1, 8), st.integers(1, 4))
def test_on_a_network_without_noise_it_is_pgd_and_stays_in_the_ball(eps, steps, draws) -> None:
    threat = ThreatModel(eps=eps)

    found = eot_pgd(network(), IMAGES, LABELS, threat=threat, steps=steps, draws=draws)

    expected = pgd(network(), IMAGES, LABELS, threat=threat, steps=steps)
    assert torch.allclose(found, expected, atol=1e-6)
    assert threat.holds(found, IMAGES).all()


def test_more_draws_raise_the_expected_loss_of_a_noisy_network_more() -> None:
    model = network()
    add_noise(model, 2.0)
    threat = ThreatModel(eps=0.1)

    def expected_loss(draws: int) -> float:
        torch.manual_seed(2)
        found = eot_pgd(model, IMAGES, LABELS, threat=threat, steps=10, draws=draws)
        with torch.no_grad():
            losses = [cross_entropy(model(found), LABELS).mean() for _ in range(500)]
        return float(torch.stack(losses).mean())

    assert expected_loss(50) > expected_loss(1)


class Alternating(nn.Module):
    """Two draws by turns: the second, weaker one has the opposite gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        slope = 3.0 if self.passes % 2 else -1.0
        logit = slope * images.flatten(1).sum(1)
        return torch.stack([torch.zeros_like(logit), logit], dim=1)


def test_a_step_follows_the_mean_of_its_draws_and_not_the_last_one() -> None:
    images, labels = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.long)

    found = eot_pgd(Alternating(), images, labels, threat=ThreatModel(eps=0.1), steps=3, draws=2)

    assert torch.allclose(found, images + 0.1)
