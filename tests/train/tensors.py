"""Comparing networks, for the tests of several packages."""

from __future__ import annotations

import torch
from torch import nn


def same_tensors(first: nn.Module, second: nn.Module) -> bool:
    """Return whether two networks hold the same tensors, bit for bit."""
    left, right = first.state_dict(), second.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
