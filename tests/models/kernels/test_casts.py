"""A step casts each weight once, however many passes the step learns from."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from medspark.models.classifier import Classifier
from medspark.models.kernels.casts import cast_weights_once
from medspark.models.kernels.lower import lower
from medspark.train.adversarial import MODES, take_step
from medspark.train.config import AdversarialConfig
from medspark.train.learner import Learner, Sample
from medspark.train.objective import CrossEntropy


class Casts(TorchDispatchMode):
    """Counts how often a tensor is cast to bf16."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._tensor = tensor
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and kwargs["dtype"] == torch.bfloat16:
            self.count += args[0].data_ptr() == self._tensor.data_ptr()
        return func(*args, **(kwargs or {}))


def test_two_passes_over_the_same_weights_cast_them_once_and_the_next_step_anew():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(64, 96, 1))
    images = torch.rand(2, 64, 2, 2)
    lowered = copy.deepcopy(plain)
    lower(lowered, images, batch_size=1)
    counts = []
    for model in (plain, lowered):
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        for _ in range(3):
            optimiser.zero_grad()
            with Casts(model[0].weight) as seen, cast_weights_once("cpu"):
                for _ in range(2):
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        output = model(images)
                    output.float().square().sum().backward()
            counts.append(seen.count)
            optimiser.step()

    assert counts == 6 * [1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(plain(images), lowered(images), rtol=0.02, atol=0.02)


def test_torch_casts_a_weight_once_for_all_passes_over_the_same_weights():
    conv, images = nn.Conv2d(3, 5, 3), torch.rand(2, 3, 8, 8)

    with Casts(conv.weight) as seen, cast_weights_once("cpu"):
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                conv(images)

    assert seen.count == 1


@pytest.mark.parametrize("mode", sorted(MODES))
def test_a_step_casts_each_weight_once_for_all_passes_that_it_learns_from(
    mode: str, tiny: Callable[..., Classifier], sample: Callable[..., Sample]
):
    model = tiny()
    weight = model.backbone[3].weight
    config = AdversarialConfig(mode=mode, inner_steps=2)
    learner = Learner(model, CrossEntropy(), config, autocast=torch.bfloat16)

    with Casts(weight) as seen:
        take_step(learner, sample(dtype=torch.float32))

    # Torch does not keep the casts of passes without parameter gradients, as those of attacks.
    without = {"naive": 1, "nfgsm": 1, "rs_fgsm": 1, "pgd": 2, "trades": 3, "ikl": 3}
    assert seen.count == 1 + without.get(mode, 0)
