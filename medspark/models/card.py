"""What has to be known about a trained network to use it; model.json beside its weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from medspark.config import Config, first_problem
from medspark.documents import read_regular
from medspark.errors import UsageError
from medspark.shards.manifest import Manifest

__all__ = ["CARD", "WEIGHTS", "ModelCard", "columns_of", "read_card", "write_card"]

WEIGHTS, CARD = "model.safetensors", "model.json"
# What an answer says besides the probabilities, and whether a file could be read.
_ANSWER = ("label", "probability", "error")
_LARGEST = 1 << 22  # bytes of a card
_PICKLED = {".pt", ".pth", ".pt2", ".pkl", ".pickle", ".bin", ".ckpt"}


# Wide enough for whatever has been trained, and too narrow for what only takes memory.
ClassName = Annotated[str, Field(min_length=1, max_length=1000)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Side = Annotated[int, Field(ge=1, le=8192)]


class ModelCard(Config):
    """What has to be known about the weights to use them. A stranger may have written it."""

    schema_version: Literal[1] = 1
    architecture: str = Field(description="timm model name", max_length=200)
    classes: tuple[ClassName, ...] = Field(min_length=2, max_length=10_000)
    multi_label: bool = Field(
        False, description="whether an image may have any of the classes, each with its own logit"
    )
    channels: int = Field(ge=1, le=64)
    height: Side = Field(description="of the training images, in pixels")
    width: Side = Field(description="of the training images, in pixels")
    bits: Literal[8, 16] = Field(8, description="per stored sample: 2**bits - 1 is 1.0 in [0, 1]")
    mean: tuple[Finite, ...] = Field(description="subtracted per channel, in [0, 1] pixels")
    std: tuple[Positive, ...] = Field(description="divided by per channel, in [0, 1] pixels")
    dropout: float = Field(0.0, ge=0, lt=1)
    temperature: Positive = Field(1.0, description="divides the logits of a calibrated probability")
    rendering: dict[str, Any] = Field({}, description="how files became the training images")
    medspark: str = Field("", description="version that wrote the files")

    @model_validator(mode="after")
    def _is_of_one_piece(self) -> ModelCard:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(
                f"{self.channels} channel(s) need as many means and deviations, and there are "
                f"{len(self.mean)} and {len(self.std)}"
            )
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("a class is named twice")
        return self

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
    from medspark.images.rendering import Rendering  # with Pillow: only where a model is opened

    path = folder / CARD
    try:
        card = ModelCard.model_validate_json(read_regular(path, most=_LARGEST))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"'{folder}' is no medspark model: it has no {CARD}.") from error
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        raise UsageError(f"'{path}' is not valid: {first_problem(error)}.") from error
    try:
        Rendering.model_validate(card.rendering)
    except ValidationError as error:
        problem = first_problem(error, below="rendering")
        raise UsageError(f"'{path}' is not valid: {problem}.") from error
    if not (folder / WEIGHTS).is_file():  # a device would be read for ever
        raise UsageError(f"'{folder}' is no medspark model: its {WEIGHTS} is missing or no file.")
    return card


def write_card(folder: Path, card: ModelCard) -> None:
    """Put ``card`` into ``folder``, whole or not at all."""
    written = folder / (CARD + ".tmp")
    written.write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(written, folder / CARD)
