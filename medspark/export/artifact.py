"""Write an exported model as a folder: the graph's files, and the card with their checksums."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from medspark.evaluate.calibrate import best_temperature
from medspark.export.choose import Candidate
from medspark.export.judge import Judge, in_batches
from medspark.export.onnx import OPSET
from medspark.export.packages import KINDS, Backend, Precision
from medspark.files import replacing
from medspark.models.card import ExportedGraph, ModelCard, write_card

__all__ = ["write_artifact"]


def write_artifact(
    folder: Path,
    graph: Candidate,
    card: ModelCard,
    *,
    backend: Backend,
    precision: Precision,
    twin: str,
    judge: Judge,
) -> ModelCard:
    """Write ``graph`` to ``folder``, the card last, and return its card.

    ``card`` is the card of the torch twin, whose weights have the SHA-256 ``twin``. The temperature
    of an int8 graph is fitted to its own logits of the validation images, unless the card has a
    decision, whose threshold holds at the twin's temperature.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in graph.files.items():
        with replacing(folder / name) as draft:
            draft.write_bytes(content)
    temperature = card.temperature
    if precision == "int8" and len(judge.labels) and card.decision is None:
        logits = torch.from_numpy(in_batches(graph.run, judge.images))
        temperature = best_temperature(logits, torch.from_numpy(judge.labels))
    exported = ExportedGraph(
        precision=precision,
        files={name: hashlib.sha256(each).hexdigest() for name, each in graph.files.items()},
        opset=OPSET,
        numbers=graph.numbers,
        twin=twin,
    )
    described = card.model_copy(
        update={"kind": KINDS[backend], "temperature": temperature, "exported": exported}
    )
    write_card(folder, described)
    return described
