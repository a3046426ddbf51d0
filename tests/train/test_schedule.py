"""Learning rate and eps are functions of the step."""

from __future__ import annotations

import pytest
import torch

from medspark.train.schedule import one_cycle, ramp


@pytest.mark.parametrize("total", [10, 57, 400])
def test_one_cycle_is_torchs(total: int):
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=0.1, total_steps=total, pct_start=0.3, cycle_momentum=False
    )
    expected = []
    for _ in range(total):
        expected.append(reference.get_last_lr()[0])
        optimiser.step()
        reference.step() if len(expected) < total else None

    found = [one_cycle(step, total, peak=0.1) for step in range(total)]

    assert found == pytest.approx(expected)


@pytest.mark.parametrize("rising", [0.0, 0.3])
def test_one_step_is_enough(rising: float):
    assert one_cycle(0, 1, peak=0.1, rising=rising) == pytest.approx(0.1)


def test_eps_rises_in_a_line_and_stays():
    assert [ramp(step, 10, share=0.5) for step in (0, 1, 4, 5, 9)] == [0.2, 0.4, 1.0, 1.0, 1.0]
    assert ramp(0, 10, share=0.0) == 1.0
