"""The best temperature: it corrects over- and underconfidence and keeps predictions."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from medspark.evaluate.calibrate import best_temperature


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_labels_were_drawn_at_is_found(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 3, generator=generator)
    labels = torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)[:, 0]

    assert best_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


def test_no_other_temperature_has_a_smaller_loss() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(200, 2, generator=generator).double()
    labels = torch.randint(0, 2, (200,), generator=generator)

    best = best_temperature(logits, labels)

    for other in (0.5 * best, 0.9 * best, 1.1 * best, 2 * best):
        if other <= 20:
            assert cross_entropy(logits / best, labels) <= cross_entropy(logits / other, labels)


def test_a_network_that_is_always_right_is_not_made_infinitely_sure() -> None:
    logits = torch.eye(2).repeat(10, 1)

    assert best_temperature(logits, logits.argmax(1)) == pytest.approx(0.2, rel=1e-3)
    assert best_temperature(logits[:0], logits[:0].argmax(1)) == 1
