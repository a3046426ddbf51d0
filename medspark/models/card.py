"""What has to be known about a trained network to use it; model.json beside its weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from medspark.config import Config
from medspark.errors import UsageError
from medspark.shards.manifest import Manifest

__all__ = ["CARD", "WEIGHTS", "ModelCard", "columns_of", "read_card", "write_card"]

WEIGHTS, CARD = "model.safetensors", "model.json"
# What an answer says besides the probabilities, and whether a file could be read.
_ANSWER = ("label", "probability", "error")
_PICKLED = {".pt", ".pth", ".pt2", ".pkl", ".pickle", ".bin", ".ckpt"}


class ModelCard(Config):
    """What has to be known about the weights to use them."""

    schema_version: Literal[1] = 1
    architecture: str = Field(description="timm model name")
    classes: tuple[str, ...] = Field(min_length=2)
    multi_label: bool = Field(
        False, description="whether an image may have any of the classes, each with its own logit"
    )
    channels: int = Field(ge=1)
    height: int = Field(ge=1, description="of the training images, in pixels")
    width: int = Field(ge=1, description="of the training images, in pixels")
    bits: int = Field(8, ge=1, description="per stored sample: 2**bits - 1 is 1.0 in [0, 1]")
    mean: tuple[float, ...] = Field(description="subtracted per channel, in [0, 1] pixels")
    std: tuple[float, ...] = Field(description="divided by per channel, in [0, 1] pixels")
    dropout: float = 0.0
    temperature: float = Field(
        1.0, gt=0, description="divides the logits of a calibrated probability"
    )
    rendering: dict[str, Any] = Field({}, description="how files became the training images")
    medspark: str = Field("", description="version that wrote the files")

    def misfit(self, manifest: Manifest) -> str:
        """Return what of the images or their labels the model is not for; nothing if it fits."""
        mine, theirs = _what_it_tells(self), _what_it_tells(manifest)
        return "" if mine == theirs else f"it tells {mine}, and the shards hold {theirs}"


def columns_of(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the names under which an answer has the probabilities of ``classes``.

    They are the classes' own. One that an answer has another meaning for has "class " before it.
    """
    taken, columns = {*_ANSWER, *classes}, []
    for name in classes:
        column = name
        while column in _ANSWER or (column != name and column in taken):
            column = f"class {column}"
        columns.append(column)
    return tuple(columns)


def _what_it_tells(of: ModelCard | Manifest) -> str:
    kind = "any of" if of.multi_label else "one of"
    return f"{kind} {', '.join(of.classes)} in images of {of.channels} channel(s)"


def read_card(folder: Path) -> ModelCard:
    """Return the card of the model in ``folder``.

    Raises UsageError if there is none, or if it is of a kind or version that is not known.
    """
    if folder.suffix in _PICKLED:
        raise UsageError(
            f"'{folder}' is a pickled model, and opening one can run code; give a folder with "
            f"{WEIGHTS} and {CARD}."
        )
    try:
        return ModelCard.model_validate_json((folder / CARD).read_bytes())
    except OSError as error:
        raise UsageError(f"'{folder}' is no medspark model: it has no {CARD}.") from error
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise UsageError(f"'{folder / CARD}' is not valid: {key}: {problem['msg']}.") from error


def write_card(folder: Path, card: ModelCard) -> None:
    """Put ``card`` into ``folder``, whole or not at all."""
    written = folder / (CARD + ".tmp")
    written.write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(written, folder / CARD)
