"""Folding returns a copy with the same logits, or None."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from medspark.models.classifier import batch_norms
from medspark.models.kernels.fold_norm import folded_copy

IMAGES = torch.rand(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution and a batch norm, whose input may also be used directly."""

    def __init__(self, *, affine: bool = True, bias: bool = True, branching: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(1, 2, 3, bias=bias), nn.BatchNorm2d(2, affine=affine)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.branching = branching

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.conv(images)
        normed = self.norm(features)
        return (normed + features if self.branching else normed).mean((2, 3))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_the_copy_has_the_same_logits_and_learns_what_the_network_would(
    affine: bool, bias: bool, learns: bool
) -> None:
    model = Net(affine=affine, bias=bias).double().requires_grad_(learns).train()
    before = copy.deepcopy(model.state_dict())

    folded, pairs = folded_copy(model, IMAGES, tolerance=1e-9)

    assert pairs == (("conv", "norm"),)
    assert not list(batch_norms(folded))
    assert folded.training
    assert {p.requires_grad for p in folded.parameters()} == {learns}
    torch.testing.assert_close(folded(IMAGES), model.eval()(IMAGES))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("tolerance", "found"), [(1e-3, False), (1e3, True)])
def test_there_is_no_copy_where_the_logits_would_be_others(tolerance: float, found: bool) -> None:
    model = Net(branching=True).double()

    assert (folded_copy(model, IMAGES, tolerance=tolerance) is not None) == found
