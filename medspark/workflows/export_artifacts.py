"""Make the exported models of one network, or find those that an interrupted export made."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from pydantic import Field, ValidationError

from medspark.config import Config
from medspark.data.native import MappedSplit
from medspark.errors import UsageError
from medspark.export.artifact import write_artifact
from medspark.export.backends import float_graph, int8_graph
from medspark.export.choose import Candidate
from medspark.export.judge import ATTACKED, Judge, attacked
from medspark.export.onnx import export_onnx
from medspark.export.packages import Backend, Precision
from medspark.export.runtime import read_graph
from medspark.files import json_digest, replacing, sha256_of, write_whole
from medspark.models.card import WEIGHTS, ModelCard, read_card
from medspark.models.checkpoint import load_classifier
from medspark.models.local import local_model
from medspark.seeding import derive
from medspark.shards.manifest import Manifest
from medspark.shards.plan import permute
from medspark.workflows.export_edge_config import ExportEdgeConfig

__all__ = ["Made", "make_artifacts"]

_LOGGER = logging.getLogger(__name__)

_MOST_JUDGED = 1000  # validation images
_MOST_ATTACKED = 128


class _Note(Config):
    """Facts about an exported model that its card does not hold."""

    tried: tuple[str, ...] = ()
    layers: dict[str, float] = Field({})


@dataclass(frozen=True)
class Made:
    """An exported model in its folder, and the graph that attacks differentiate."""

    backend: Backend
    precision: Precision
    folder: Path
    surrogate: Path
    card: ModelCard
    tried: tuple[str, ...]
    layers: dict[str, float]

    @property
    def name(self) -> str:
        """The name of the folder, such as onnxruntime-int8."""
        return self.folder.name

    @property
    def numbers(self) -> str:
        """The format of weights and activations."""
        return "" if self.card.exported is None else self.card.exported.numbers

    @property
    def bytes(self) -> int:
        """The size of the graph's files."""
        files = () if self.card.exported is None else self.card.exported.files
        return sum((self.folder / name).stat().st_size for name in files)

    @property
    def digest(self) -> str:
        """A hash of the graph's files and of the surrogate."""
        files = {} if self.card.exported is None else self.card.exported.files
        return json_digest([files, sha256_of(self.surrogate)])


def make_artifacts(
    config: ExportEdgeConfig, manifest: Manifest, model: Path, folder: Path
) -> list[Made]:
    """Return every asked export of the network in ``model``, made in ``folder`` if missing.

    Raises UsageError for a network that cannot be exported.
    """
    wanted = [(backend, precision) for backend in config.backend for precision in config.precision]
    twin = sha256_of(local_model(model) / WEIGHTS)
    found = {pair: _found(folder, *pair, twin=twin) for pair in wanted}
    if any(each is None for each in found.values()):
        workshop = _Workshop(config, manifest, model, folder, twin)
        found |= {pair: workshop.make(*pair) for pair, each in found.items() if each is None}
    return [each for each in found.values() if each is not None]


class _Workshop:
    """The float graph of one network, and the images that calibrate and judge."""

    def __init__(
        self, config: ExportEdgeConfig, manifest: Manifest, model: Path, folder: Path, twin: str
    ) -> None:
        self._config, self._manifest, self._folder, self._twin = config, manifest, folder, twin
        self._card = read_card(model)
        self._network = load_classifier(model)
        self._content = export_onnx(self._network, height=manifest.height, width=manifest.width)
        self._run = float_graph("onnxruntime", self._content).run
        split = "val" if manifest.splits["val"].rows else "train"
        self._judge = Judge.of(*self._images(split, _MOST_JUDGED), self._run)

    def make(self, backend: Backend, precision: Precision) -> Made:
        """Return one export, written to its folder."""
        if precision == "fp32":
            graph, note = float_graph(backend, self._content), _Note()
        else:
            calibration, _ = self._images("train", self._config.calibration_images)
            judges = [self._judge, self._attacked]
            choice = int8_graph(backend, self._content, calibration, judges)
            graph = choice.chosen
            note = _Note(tried=tuple(map(str, choice.tried)), layers=choice.layers)
        _LOGGER.info("%s %s: %s", backend, precision, graph.numbers)
        return self._write(backend, precision, graph, note)

    @cached_property
    def _attacked(self) -> Judge:
        """The judge of attacked images, at the largest budget of the configuration."""
        threat = self._config.settings_of(()).threat(max(self._config.eps, default=0.0))
        images = attacked(self._judge, self._network, threat, most=_MOST_ATTACKED)
        return Judge.of(images, self._judge.labels[: len(images)], self._run, ATTACKED)

    def _write(self, backend: Backend, precision: Precision, graph: Candidate, note: _Note) -> Made:
        work = self._folder / "work"
        work.mkdir(exist_ok=True)
        name = f"{backend}-{precision}"
        with replacing(work / f"{name}.onnx") as draft:
            draft.write_bytes(graph.surrogate)
        write_whole(work / f"{name}.json", note.model_dump_json() + "\n")
        card = write_artifact(
            self._folder / name,
            graph,
            self._card,
            backend=backend,
            precision=precision,
            twin=self._twin,
            judge=self._judge,
        )
        surrogate = work / f"{name}.onnx"
        folder = self._folder / name
        return Made(backend, precision, folder, surrogate, card, note.tried, note.layers)

    def _images(self, split: str, most: int) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
        """Return at most ``most`` images (N, C, H, W) of ``split`` in [0, 1], and their labels."""
        mapped = MappedSplit(self._config.shards, self._manifest, split)
        count = min(most, len(mapped))
        key = derive(self._config.seed, "calibration")
        rows = np.sort(permute(np.arange(count), len(mapped), key))
        images, labels = mapped.tensors(rows)
        return images.numpy(), labels.numpy()


def _found(folder: Path, backend: Backend, precision: Precision, *, twin: str) -> Made | None:
    """Return the export that an earlier call made of the same weights, None if there is none."""
    name = f"{backend}-{precision}"
    place, surrogate = folder / name, folder / "work" / f"{name}.onnx"
    try:
        card = read_card(place, kinds=("onnx", "openvino"))
        assert card.exported is not None, "the card was validated"
        read_graph(place, card.exported)
        note = _Note.model_validate_json(surrogate.with_suffix(".json").read_text("utf-8"))
    except (UsageError, OSError, ValidationError):
        return None
    if card.exported.twin != twin or not surrogate.is_file():
        return None
    return Made(backend, precision, place, surrogate, card, note.tried, note.layers)
