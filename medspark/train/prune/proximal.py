"""The lasso as a proximal step, which makes weights exactly zero.

The proximal operator of c * |w| is soft thresholding: it moves every weight towards zero by c and
stops there. A subgradient would jump across zero and never stay there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medspark.models.masks import layer_scale

__all__ = ["even_penalty", "soft_threshold_"]


@torch.no_grad()
def soft_threshold_(weight: Tensor, amount: float) -> None:
    """Replace each w of ``weight`` by sign(w) * max(|w| - ``amount``, 0), in place."""
    weight.copy_(torch.nn.functional.softshrink(weight, amount))


def even_penalty(weights: Sequence[Tensor], sparsity: float, rates: Sequence[float]) -> float:
    """Return the penalty that alone, with no gradient, would make ``sparsity`` of weights zero.

    A step at learning rate r shrinks weights by r times the penalty; ``rates`` are those of all
    steps. Weights count in units of their layer (``layer_scale``), in which the penalty is as well.
    The loss resists where it needs a weight, so this brings about that sparsity.
    """
    sizes = torch.cat([(w.detach().abs() / layer_scale(w)).flatten() for w in weights])
    pruned, total = round(sparsity * len(sizes)), sum(rates)
    if pruned == 0 or total == 0:
        return 0.0
    return float(torch.kthvalue(sizes, pruned).values) / total
