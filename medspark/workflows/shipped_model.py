"""A model that travels to executors and answers images there, a network per Python worker.

This module imports no torch: executors that answer with an exported model need none.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from pyspark.sql import SparkSession

from medspark.documents import read_regular
from medspark.files import json_digest
from medspark.images.frame import Pixels
from medspark.models.card import CARD, WEIGHTS, Kind, ModelCard, read_card
from medspark.models.local import local_model
from medspark.models.prediction import Floats, answer_of, as_pixels
from medspark.predict.answer_task import Answer
from medspark.spark.cluster import Shared, shared, task_cpus

__all__ = ["ModelFiles", "ShippedModel"]

_LARGEST = 1 << 34  # bytes of a file of a model

# Calibrated probabilities (N, K) of stored images (N, H, W, C).
_Predict = Callable[[npt.NDArray[Any]], Floats]


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model folder, as they were when they were read."""

    card: ModelCard
    files: dict[str, bytes]

    @classmethod
    def read(cls, folder: Path) -> ModelFiles:
        """Read a trained, pruned or exported model.

        Raises UsageError if the folder holds none.
        """
        folder = local_model(folder)
        card = read_card(folder, kinds=get_args(Kind))
        names = [CARD, *((WEIGHTS,) if card.exported is None else card.exported.files)]
        return cls(card, {name: read_regular(folder / name, most=_LARGEST) for name in names})

    @property
    def digest(self) -> str:
        """The SHA-256 of all files. The card decides answers too: classes, temperature."""
        return json_digest({name: sha256(each).hexdigest() for name, each in self.files.items()})

    def shipped(self, spark: SparkSession) -> ShippedModel:
        """Return the model for the tasks of ``spark``, with as many threads as a task has cores."""
        return ShippedModel(self.card, self.digest, shared(spark, self.files), task_cpus(spark))

    def check(self) -> None:
        """Answer a black image. Raises UsageError if the model cannot be used."""
        card = self.card
        shape = (1, card.height, card.width, card.channels)
        _opened(card, self.files, threads=1)(np.zeros(shape, dtype=f"u{card.bits // 8}"))


@dataclass(frozen=True)
class ShippedModel:
    """A model on executors. What is pickled is small: the files are shared."""

    card: ModelCard
    digest: str
    files: Shared[dict[str, bytes]]
    threads: int

    def __call__(self, images: Sequence[Pixels]) -> list[Answer]:
        """Return label, probability and probabilities of rendered ``images``."""
        probabilities = _network(self)(np.stack([as_pixels(image) for image in images]))
        return [_answer(row, self.card) for row in probabilities]


def _answer(row: Floats, card: ModelCard) -> Answer:
    answer = answer_of(row, card)
    probabilities = [(name, float(value)) for name, value in zip(card.classes, row, strict=True)]
    return {name: answer[name] for name in ("label", "probability")} | {
        "probabilities": probabilities
    }


# The network of this worker process, which lives longer than a task.
_networks: dict[tuple[str, int], _Predict] = {}


def _network(model: ShippedModel) -> _Predict:
    name = model.digest, model.threads
    if name not in _networks:
        _networks.clear()
        _networks[name] = _opened(model.card, model.files.value, threads=model.threads)
    return _networks[name]


def _opened(card: ModelCard, files: dict[str, bytes], *, threads: int) -> _Predict:
    """Open the model in ``files``. Only a network with weights needs torch."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        if card.exported is None:
            return _torch_network(Path(folder), threads)
        from medspark.export.runtime import DeployedModel

        return DeployedModel.load(Path(folder), threads=threads)


def _torch_network(folder: Path, threads: int) -> _Predict:
    import torch

    from medspark.models.predictor import Predictor

    torch.set_num_threads(threads)
    return Predictor.load(folder)
