"""NNCF's graphs: 8 bits, or 7 where a processor would saturate."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from networks import SIDE, images, network
from onnx import numpy_helper

from medspark.export.onnx import export_onnx
from medspark.export.openvino_graph import quantised_by_nncf
from medspark.export.quantise import prepared

READY = prepared(export_onnx(network(), height=SIDE, width=SIDE))


@pytest.mark.parametrize(("narrow", "largest"), [(False, 128), (True, 64)])
def test_weights_of_seven_bits_leave_room_for_sums_in_16_bits(narrow: bool, largest: int) -> None:
    pytest.importorskip("nncf", reason="nncf is not installed")

    graph = onnx.load_from_string(
        quantised_by_nncf(READY, images(8).numpy(), reduce_range=narrow)
    ).graph

    stored = [numpy_helper.to_array(each) for each in graph.initializer if each.data_type == 3]
    weights = [np.abs(each.astype(int)).max() for each in stored if each.ndim == 4]
    assert len(weights) > 10
    assert largest - 2 <= max(weights) <= largest
