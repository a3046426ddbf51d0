"""A network in ONNX answers as it does in torch, or is refused with the operator's name."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from guarded_networks import build_guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import SIDE, images, network
from torch import Tensor, nn

from medspark.errors import UsageError
from medspark.export.onnx import OPSET, TOLERANCE, export_onnx
from medspark.export.straight_through import StraightThrough
from medspark.models.classifier import Classifier
from medspark.models.onnx_session import OnnxSession

NETWORK = network()
GRAPH = export_onnx(NETWORK, height=SIDE, width=SIDE)
RUN = OnnxSession(GRAPH, name="test")


@given(st.integers(0, 1 << 30), st.integers(1, 9))
@settings(max_examples=20)
def test_any_batch_gets_the_probabilities_of_the_torch_network(seed: int, count: int) -> None:
    batch = images(count, seed)

    with torch.no_grad():
        wanted = NETWORK(batch).softmax(1)
    found = torch.from_numpy(RUN(batch.numpy())).softmax(1)

    assert float((found - wanted).abs().max()) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv2_100", "resnet10t", "densenet121", "resnet50"])
def test_the_usual_networks_can_be_exported(name: str) -> None:
    assert export_onnx(network(name=name), height=SIDE, width=SIDE)  # which compares the answers


@pytest.mark.parametrize("side", [32, 30])  # with patches that divide the image, and without
def test_a_guarded_network_is_exported_with_its_denoiser_and_has_a_torch_twin(side: int) -> None:
    guarded, batch = build_guarded(side=side), torch.rand(3, 1, side, side)

    twin = StraightThrough(export_onnx(guarded, height=side, width=side))

    assert torch.allclose(twin(batch), guarded(batch), atol=1e-5)
    assert not torch.allclose(twin(batch), guarded.classify(batch), atol=1e-4)


def test_normalisation_is_inside_and_the_operators_are_of_the_stated_version() -> None:
    shifted = network()
    shifted.normalise.mean += 0.25
    other = OnnxSession(export_onnx(shifted, height=SIDE, width=SIDE), name="test")

    assert [opset.version for opset in onnx.load_from_string(GRAPH).opset_import] == [OPSET]
    assert not np.allclose(other(images(2).numpy()), RUN(images(2).numpy()))


class _Odd(nn.Module):
    """A network with an operation of its own before its only layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.head = kind, nn.Linear(SIDE * SIDE, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "bessel":
            x = torch.special.bessel_j0(x)
        return self.head(x.flatten(1)) * (float(len(x)) if self.kind == "counts" else 1)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("bessel", "odd cannot be exported: ONNX operators of version 17 have no counterpart of "
         "aten::special_bessel_j0."),
        ("counts", "odd cannot be exported: in ONNX its probabilities differ"),
    ],
)  # fmt: skip
def test_what_onnx_cannot_do_is_one_sentence(kind: str, sentence: str) -> None:
    odd = Classifier(_Odd(kind), architecture="odd", mean=[0.5], std=[0.5])

    with pytest.raises(UsageError) as refused:
        export_onnx(odd, height=SIDE, width=SIDE)

    assert str(refused.value).startswith(sentence)
    assert "\n" not in str(refused.value)
