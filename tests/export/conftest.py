"""The fixtures of tests of exports; all of them need onnx and onnxruntime."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx", reason="exports need onnx: pip install medspark[edge]")
pytest.importorskip("onnxruntime", reason="exports need onnxruntime: pip install medspark[edge]")

from networks import model, shards

__all__ = ["model", "shards"]
