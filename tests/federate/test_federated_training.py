"""CalFAT's calibration and SFAT's slack follow the formulas of their papers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from draws import seeds
from hypothesis import given
from hypothesis import strategies as st

from medspark.federate.calfat import Calibrated
from medspark.federate.sfat import slack_counts


@given(seeds)
def test_calibration_multiplies_each_class_by_its_images(seed: int):
    draw = torch.Generator().manual_seed(seed % 2**31)
    logits, labels = torch.randn(6, 3, generator=draw), torch.tensor([0, 0, 0, 1, 1, 2])
    likely = torch.tensor([3.0, 2.0, 1.0]) * logits.exp()

    loss = Calibrated.to(labels)(logits, labels)

    share = likely / likely.sum(1, keepdim=True)
    assert torch.allclose(loss, -share[torch.arange(6), labels].log().mean(), atol=1e-5)


def test_a_class_after_the_last_of_the_client_counts_as_none():
    calibrated = Calibrated.to(torch.tensor([0, 1, 1])).logits(torch.zeros(1, 4))

    assert F.softmax(calibrated, 1)[0].tolist() == pytest.approx([1 / 3, 2 / 3, 0, 0], abs=1e-6)


def test_sfat_favours_the_smallest_losses_as_published():
    """Five clients of equal size, one enhanced by 1.4: 1.4 / (4 + 1.4) and 1 / (4 + 1.4)."""
    weighed = slack_counts([10] * 5, [3.0, 1.0, 2.0, 5.0, 4.0])

    assert (weighed / weighed.sum()).tolist() == pytest.approx(
        [1 / 5.4, 1.4 / 5.4, 1 / 5.4, 1 / 5.4, 1 / 5.4]
    )


@given(
    st.lists(st.floats(1, 100), min_size=3, max_size=9),
    st.floats(0, 0.9),
    st.integers(0, 3),
)
def test_sfat_keeps_the_sum_of_all_weights(counts: list[float], slack: float, enhanced: int):
    weighed = slack_counts(counts, counts, slack=slack, enhanced=enhanced)

    assert weighed.sum() == pytest.approx(sum(counts))
