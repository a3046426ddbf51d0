"""ReLU on the bits of a number equals ReLU."""

from __future__ import annotations

import pytest
import torch

from medspark.models.kernels.bit_relu import block_, relu_

# All bf16 values, including infinities and NaN.
EVERY = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def test_every_bf16_number_comes_out_as_from_torch():
    found, expected = relu_(EVERY.clone()), EVERY.relu()

    assert torch.equal(found.nan_to_num(nan=-1), expected.nan_to_num(nan=-1))
    assert not found.signbit()[~found.isnan()].any()


def test_the_gradient_passes_where_the_output_is_positive():
    output = EVERY.relu()
    output = output[~output.isnan()]
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).bfloat16()

    expected = torch.where(output > 0, gradient, 0)

    assert torch.equal(block_(gradient.clone(), output), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_numbers_take_torchs_way(dtype: torch.dtype):
    x = torch.randn(100, dtype=dtype, generator=torch.Generator().manual_seed(0))

    assert torch.equal(relu_(x.clone()), x.relu())
    assert torch.equal(block_(x.clone(), x.relu()), x.relu())
