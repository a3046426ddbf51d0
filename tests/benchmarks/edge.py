"""Exported models against eager torch and the better float runtime: one image, one thread.

Random weights and calibration images: the time of a graph does not depend on them. The int8 graph
is the fastest of the formats of both backends that suit this processor, with the logits in float,
as exports have them; the log names it. The goals are for processors with instructions for sums of
8-bit products (VNNI).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import statistics
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from timing import Result, by_turns

from medspark.export.latency import measured_by
from medspark.export.onnx import export_onnx
from medspark.export.packages import Backend
from medspark.export.processor import dot_product
from medspark.export.quantise import formats, output_layer, prepared, quantised
from medspark.models.backbones import build
from medspark.models.classifier import Classifier
from medspark.models.config import ModelConfig

if TYPE_CHECKING:
    from medspark.export.choose import Candidate

TURNS = int(os.environ.get("MEDSPARK_BENCH_TURNS", "15"))
_EACH = 5  # images a turn
_CALIBRATION = 8
# int8 ÷ eager torch at 64 and 224 pixels, int8 ÷ the better float runtime at 224 pixels.
GOALS = {
    "mobilenetv2_100": (0.07, 0.18, 0.50),
    "resnet50": (0.08, 0.20, 0.30),
    "densenet121": (0.16, 0.20, 0.35),
}
BACKENDS: tuple[Backend, ...] = ("onnxruntime", "openvino")

_LOGGER = logging.getLogger(__name__)


@cache
def _network(name: str) -> Classifier:
    torch.manual_seed(0)
    return build(ModelConfig(name=name), num_classes=2, channels=1).eval()


@cache
def _float(name: str, side: int) -> bytes:
    return export_onnx(_network(name), height=side, width=side)


def _graph(backend: Backend, content: bytes) -> Candidate:
    from medspark.export.backends import float_graph  # imports onnx, which may be missing

    return float_graph(backend, content)


@cache
def _int8(name: str, side: int) -> Candidate:
    """Return the fastest int8 graph."""
    from medspark.export.openvino_graph import quantised_by_nncf

    ready = prepared(_float(name, side))
    shape = (_CALIBRATION, 1, side, side)
    images = np.random.default_rng(0).random(shape, dtype=np.float32)
    last, found = [output_layer(ready).name], dot_product()
    made = {
        f"onnxruntime {each}": _graph(
            "onnxruntime", quantised(ready, images, each, keep_float=last)
        )
        for each in formats(dot_product=found)
    }
    graph = quantised_by_nncf(ready, images, reduce_range=not found, keep_float=last)
    made["openvino NNCF"] = _graph("openvino", graph)
    return _fastest(name, side, made)


def _fastest(name: str, side: int, made: dict[str, Candidate]) -> Candidate:
    taken = {
        each: statistics.median(measured_by(graph.run, _image(side), images=15))
        for each, graph in made.items()
    }
    for each, seconds in taken.items():
        _LOGGER.info("%s %d px: %s %.2f ms", name, side, each, 1000 * seconds)
    return made[min(taken, key=lambda each: taken[each])]


def _image(side: int) -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(1).random((1, 1, side, side), dtype=np.float32)


def _several(run: Callable[[np.ndarray], object], side: int) -> Callable[[], None]:  # type: ignore[type-arg]
    image = _image(side)

    def work() -> None:
        for _ in range(_EACH):
            run(image)

    return work


def _eager(name: str) -> Callable[[np.ndarray], object]:  # type: ignore[type-arg]
    torch.set_num_threads(1)
    model = _network(name)

    @torch.inference_mode()
    def run(image: np.ndarray) -> object:  # type: ignore[type-arg]
        return model(torch.from_numpy(image))

    return run


def against_eager(name: str, side: int, goal: float) -> Result:
    """Return the time of the int8 graph over that of the torch network."""
    ours, theirs = _several(_int8(name, side).run, side), _several(_eager(name), side)
    return Result(by_turns(ours, theirs, turns=TURNS, warm_up=2), goal, higher_is_better=False)


def against_float(name: str, side: int, goal: float) -> Result:
    """Return the time of the int8 graph over that of the better float runtime."""
    made = {each: _graph(each, _float(name, side)) for each in BACKENDS}
    theirs = _several(_fastest(name, side, {str(k): v for k, v in made.items()}).run, side)
    ours = _several(_int8(name, side).run, side)
    return Result(by_turns(ours, theirs, turns=TURNS, warm_up=2), goal, higher_is_better=False)


def megabytes(name: str, goal: float) -> Result:
    """Return the size of the int8 graph at 64 pixels."""
    size = sum(len(content) for content in _int8(name, 64).files.values())
    return Result((size / 1e6,), goal, higher_is_better=False)


def narrowed(name: str, side: int) -> Result:
    """Return the time of a float graph with half of the multiply-adds over that of the whole one.

    Both run in onnxruntime; whole channels were removed, as jobs/prune.py --structured does.
    """
    from medspark.train.prune.channels import remove_channels  # imports torch-pruning

    whole = _network(name)
    half = remove_channels(whole, torch.from_numpy(_image(side)), 0.5)
    ours, theirs = (
        _several(_graph("onnxruntime", export_onnx(model, height=side, width=side)).run, side)
        for model in (half, whole)
    )
    return Result(by_turns(ours, theirs, turns=TURNS, warm_up=2), 0.6, higher_is_better=False)


BENCHMARKS: dict[str, Callable[[], Result]] = {}
_MEASURED = GOALS if all(map(importlib.util.find_spec, ("onnx", "openvino", "nncf"))) else {}
for _name, (_small, _large, _runtime) in _MEASURED.items():
    for _side, _goal in ((64, _small), (224, _large)):
        BENCHMARKS[f"edge/int8_vs_eager/{_name}/{_side}"] = partial(
            against_eager, _name, _side, _goal
        )
    BENCHMARKS[f"edge/int8_vs_float/{_name}/224"] = partial(against_float, _name, 224, _runtime)
if _MEASURED and importlib.util.find_spec("torch_pruning"):
    for _name in ("mobilenetv2_100", "resnet18", "resnet50"):
        for _side in (32, 64):
            BENCHMARKS[f"edge/narrowed_vs_whole/{_name}/{_side}"] = partial(narrowed, _name, _side)
if _MEASURED:
    BENCHMARKS["edge/megabytes/mobilenetv2_100"] = partial(megabytes, "mobilenetv2_100", 2.8)
