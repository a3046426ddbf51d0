"""Attack images at several budgets in less time than at each of them alone.

Attacks that look for the nearest wrong image have no budget: they run once. An ensemble goes from
the largest budget to the smallest. Nearly all of its time goes to images that it does not fool, and
what is allowed at a smaller budget is allowed at a larger one too: an image that held there is not
attacked again. Control images are attacked at every budget all the same, so that the sanity flag
``not_falling_with_eps`` can contradict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from medspark.attacks.threat import ThreatModel

__all__ = ["ENSEMBLES", "NEAREST", "Found", "downwards", "once"]

# Attacks without a budget; their images are projected into the threat model.
NEAREST = frozenset({"fab", "deepfool", "cw"})
# Attacks that go through the budgets from the largest to the smallest.
ENSEMBLES = frozenset({"autoattack"})

# Returns the attacked ones of the chosen images, given as a mask (B,).
Run = Callable[[ThreatModel, Tensor], Tensor]


@dataclass(frozen=True)
class Found:
    """Images (B, C, H, W) at one budget; those that ``carried`` (B,) marks were not attacked."""

    images: Tensor
    carried: Tensor


def once(run: Run, clean: Tensor, threats: Mapping[float, ThreatModel]) -> dict[float, Found]:
    """Return what an attack that looks for the nearest wrong image finds at every budget."""
    every = torch.ones(len(clean), dtype=torch.bool, device=clean.device)
    norm = next(iter(threats.values())).norm
    nearest = run(ThreatModel.model_construct(norm=norm, eps=1.0), every)  # anywhere in [0, 1]
    return {eps: Found(threat.project(nearest, clean), ~every) for eps, threat in threats.items()}


def downwards(
    run: Run,
    clean: Tensor,
    threats: Mapping[float, ThreatModel],
    *,
    fools: Callable[[Tensor], Tensor],
    control: Tensor,
) -> dict[float, Found]:
    """Return what an attack finds at every budget, from the largest to the smallest.

    An image that does not fool the model at one budget (``fools`` returns a mask, (B,)) is carried
    to the next smaller one: its perturbation is projected. Images of ``control`` (B,) are not.
    """
    found: dict[float, Found] = {}
    images, chosen = clean, torch.ones_like(control)
    for eps in sorted(threats, reverse=True):
        images = threats[eps].project(images, clean)
        if chosen.any():
            images[chosen] = run(threats[eps], chosen)
        found[eps] = Found(images, ~chosen)
        chosen = fools(images) | control
    return found
