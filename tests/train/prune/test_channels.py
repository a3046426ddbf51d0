"""Whole channels go: a network that computes less, and that loads without the package."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torch_pruning", reason="structured pruning: pip install medspark[prune]")

from medspark.errors import UsageError
from medspark.models.backbones import build
from medspark.models.config import ModelConfig
from medspark.models.cost import multiply_adds
from medspark.models.widths import narrow, widths_of
from medspark.train.prune.channels import remove_channels

IMAGE = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def network(name: str = "test_resnet"):
    torch.manual_seed(0)
    return build(ModelConfig(name=name), num_classes=2, channels=1).eval()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.8])
def test_at_least_the_share_of_the_multiply_adds_goes_and_little_more(share: float) -> None:
    model = network()

    narrower = remove_channels(model, IMAGE, share)

    gone = 1 - multiply_adds(narrower, IMAGE) / multiply_adds(model, IMAGE)
    assert share <= gone <= share + 0.15


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv2_050"])
def test_the_widths_alone_make_the_network_again(name: str) -> None:
    model = network(name)
    narrower = remove_channels(model, IMAGE, 0.5)
    again = network(name)

    narrow(again, narrower.widths)
    again.load_state_dict(narrower.state_dict())

    assert torch.equal(again(IMAGE), narrower(IMAGE))
    own = widths_of(model)
    assert all(width <= own[name] for name, width in narrower.widths.items())


def test_the_channels_with_the_smallest_weights_go() -> None:
    model = network()
    layer = model.backbone.layer1[0].conv1
    with torch.no_grad():
        layer.weight[::2] *= 1e-3

    narrower = remove_channels(model, IMAGE, 0.3)

    left = narrower.backbone.layer1[0].conv1.weight.flatten(1).norm(dim=1)
    assert left.median() > 1e-2 * layer.weight[1::2].flatten(1).norm(dim=1).median()


def test_a_network_that_cannot_lose_so_much_is_one_sentence() -> None:
    with pytest.raises(UsageError, match=r"cannot lose 0\.9999 of its multiply-adds"):
        remove_channels(network(), IMAGE, 0.9999)


@pytest.mark.parametrize("name", ["mobilenetv2_050", "resnet10t"])
def test_widths_are_multiples_of_the_channels_that_convolutions_compute_at_once(name: str) -> None:
    narrower = remove_channels(network(name), IMAGE, 0.5)

    widths = {name: out for name, (out, _) in narrower.widths.items() if out > 2}  # classes
    assert widths
    assert all(width % 8 == 0 for width in widths.values())


def test_what_blocks_add_up_to_stays_whole_if_the_inside_of_the_blocks_suffices() -> None:
    model = network("resnet10t")
    own = {name: out for name, (out, _) in widths_of(model).items()}

    def narrowed(share: float) -> set[str]:
        widths = remove_channels(model, IMAGE, share).widths
        return {name for name, (out, _) in widths.items() if out < own[name]}

    inside, all_over = narrowed(0.3), narrowed(0.9)

    assert {"backbone.layer3.0.conv1", "backbone.layer3.0.bn1"} <= inside
    assert not {"backbone.layer3.0.conv2", "backbone.layer3.0.downsample.1"} & inside
    assert {"backbone.layer3.0.conv2", "backbone.layer3.0.downsample.1"} <= all_over
