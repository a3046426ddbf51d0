"""Open an exported model and run it; no torch, Spark or MLflow.

The bytes whose checksum was verified are the bytes that are loaded. Neither backend runs code from
them: a graph is a list of known operators.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from medspark.documents import read_regular
from medspark.errors import UsageError
from medspark.models.card import ExportedGraph, GraphFile, ModelCard, read_card
from medspark.models.onnx_session import OnnxSession
from medspark.models.prediction import Floats, calibrated, unit_floats

__all__ = ["BIN", "ONNX", "XML", "DeployedModel", "Run", "openvino_runner", "read_graph"]

ONNX: GraphFile = "model.onnx"
XML: GraphFile = "model.xml"  # OpenVINO's format has two files
BIN: GraphFile = "model.bin"
_LARGEST = (1 << 31) - 1  # bytes of a graph; ONNX allows no more in one file

# Logits (N, K) of images (N, C, H, W) in [0, 1].
Run = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


class DeployedModel:
    """An exported model: logits and calibrated probabilities of images."""

    def __init__(self, card: ModelCard, run: Run) -> None:
        self.card = card
        self._run = run

    @classmethod
    def load(cls, folder: Path, *, threads: int = 1) -> Self:
        """Open the model in ``folder``.

        Raises UsageError if it is not an exported model, if a file changed after the export, or if
        the backend is not installed.
        """
        card = read_card(folder, kinds=("onnx", "openvino"))
        assert card.exported is not None, "the card was validated"
        files = read_graph(folder, card.exported)
        if card.kind == "onnx":
            run: Run = OnnxSession(files[ONNX], name=str(folder / ONNX), threads=threads)
        else:
            run = openvino_runner(files[XML], files[BIN], name=str(folder / XML), threads=threads)
        return cls(card, run)

    def logits(self, images: Floats) -> Floats:
        """Return the logits (N, K) of images (N, C, H, W), floats in [0, 1]."""
        logits = np.asarray(self._run(images), dtype=np.float32)
        wanted = (len(images), len(self.card.classes))
        if logits.shape != wanted:
            raise UsageError(f"The graph's output is {logits.shape}, but the card needs {wanted}.")
        return logits

    def __call__(self, images: npt.NDArray[np.generic]) -> Floats:
        """Return calibrated probabilities (N, K) of ``images`` (N, H, W, C).

        Unsigned integers are stored pixels with the card's bits; floats are in [0, 1].
        """
        pixels = unit_floats(images, self.card) if images.dtype.kind == "u" else images
        planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32)
        return calibrated(self.logits(planes), self.card)


def read_graph(folder: Path, exported: ExportedGraph) -> dict[GraphFile, bytes]:
    """Return the content of the graph's files. Raises UsageError for a file that changed."""
    files: dict[GraphFile, bytes] = {}
    for name, wanted in exported.files.items():
        try:
            files[name] = read_regular(folder / name, most=_LARGEST)
        except OSError as error:
            raise UsageError(f"'{folder / name}' cannot be read: {error.strerror}.") from error
        if hashlib.sha256(files[name]).hexdigest() != wanted:
            raise UsageError(
                f"'{folder / name}' is not the file that the model card describes: its SHA-256 "
                "differs. Export the model again."
            )
    return files


def openvino_runner(xml: bytes, weights: bytes, *, name: str, threads: int = 1) -> Run:
    """Return the function that runs an OpenVINO model given by the content of its files.

    It has one form for single images, compiled here, and one for batches, compiled when the first
    comes. Raises UsageError if OpenVINO cannot read the files, or is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise UsageError("This model needs openvino: pip install medspark[openvino].") from error
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        # The default is bf16 on processors that have it: three significant digits.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    core = openvino.Core()

    def opened(batch: int | None) -> Any:
        model = core.read_model(model=xml, weights=weights)
        if batch is not None:
            _, *rest = model.inputs[0].partial_shape
            model.reshape({0: [batch, *rest]})
        return core.compile_model(model, "CPU", settings).create_infer_request()

    requests: dict[int | None, Any] = {}
    try:
        # With a fixed batch, concatenations share memory: DenseNet121 takes .93 of the time.
        requests[1] = opened(1)
        image = tuple(requests[1].model_inputs[0].shape)[1:]
    except RuntimeError as error:
        raise UsageError(f"'{name}' cannot be opened as an OpenVINO model.") from error

    def run(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
        # OpenVINO's form for batches takes images of another shape, and answers any number of rows.
        if images.shape[1:] != image:
            raise UsageError(f"'{name}' does not take images {images.shape}.")
        batch = 1 if len(images) == 1 else None
        try:
            if batch not in requests:
                requests[batch] = opened(batch)
            return np.array(requests[batch].infer({0: images})[0])
        except RuntimeError as error:
            raise UsageError(f"'{name}' does not take images {images.shape}.") from error

    return run
