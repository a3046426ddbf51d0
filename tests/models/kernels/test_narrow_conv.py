"""Gradients from the unfolded output gradient are the convolution's."""

from __future__ import annotations

import pytest
import torch

from medspark.models.kernels.narrow_conv import narrow_backward


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (3, 5), (50, 50)])
def test_both_gradients_are_those_of_the_convolution(height: int, width: int):
    torch.manual_seed(0)
    layout = {"memory_format": torch.channels_last}
    x = torch.randn(2, 12, height, width, dtype=torch.float64).to(**layout)
    weight = torch.randn(4, 12, 3, 3, dtype=torch.float64).to(**layout)
    gradient = torch.randn(2, 4, height, width, dtype=torch.float64).to(**layout)

    found = narrow_backward(gradient, x, weight)

    shape = (x, weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (True, True, False))
    expected = torch.ops.aten.convolution_backward(gradient, *shape)
    assert all(torch.allclose(a, b) for a, b in zip(found, expected[:2], strict=True))
    assert all(a.stride() == b.stride() for a, b in zip(found, (x, weight), strict=True))
