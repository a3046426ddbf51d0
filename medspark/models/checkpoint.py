"""A trained classifier on disk: model.safetensors beside model.json. Nothing is unpickled.

A folder without its model.json does not exist for readers: the card is renamed into place
last.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from medspark import __version__
from medspark.config import Config
from medspark.errors import UsageError
from medspark.models.backbones import ModelConfig, build
from medspark.models.classifier import Classifier, Normalise
from medspark.shards.manifest import Manifest

WEIGHTS, CARD = "model.safetensors", "model.json"
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


def _what_it_tells(of: ModelCard | Manifest) -> str:
    kind = "any of" if of.multi_label else "one of"
    return f"{kind} {', '.join(of.classes)} in images of {of.channels} channel(s)"


def describe(
    model: Classifier,
    *,
    classes: tuple[str, ...],
    height: int,
    width: int,
    multi_label: bool = False,
    bits: int = 8,
    dropout: float = 0.0,
    rendering: dict[str, Any] | None = None,
) -> ModelCard:
    """Return the card of ``model``, whose logits follow the order of ``classes``."""
    return ModelCard(
        architecture=model.architecture,
        classes=classes,
        multi_label=multi_label,
        channels=model.channels,
        height=height,
        width=width,
        bits=bits,
        mean=tuple(model.normalise.mean.flatten().tolist()),
        std=tuple(model.normalise.std.flatten().tolist()),
        dropout=dropout,
        rendering=rendering or {},
        medspark=__version__,
    )


def save_classifier(folder: Path, model: Classifier, card: ModelCard) -> None:
    """Write ``model`` and its ``card`` to ``folder``, atomically, the card last."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / (WEIGHTS + ".tmp")
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    save_file(state, weights, metadata={"architecture": card.architecture})
    os.replace(weights, folder / WEIGHTS)
    written = folder / (CARD + ".tmp")
    written.write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(written, folder / CARD)


def calibrate(folder: Path, temperature: float) -> None:
    """Note in ``folder`` what the logits of its model are divided by for a probability."""
    card = read_card(folder).model_copy(update={"temperature": temperature})
    written = folder / (CARD + ".tmp")
    written.write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(written, folder / CARD)


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


def load_classifier(folder: Path) -> Classifier:
    """Return the classifier in ``folder``, in eval mode, on the CPU.

    Raises UsageError if the folder holds no model, or one whose weights do not fit its card.
    """
    card = read_card(folder)
    config = ModelConfig(name=card.architecture, dropout=card.dropout)
    model = build(config, num_classes=len(card.classes), channels=card.channels)
    model.normalise = Normalise(card.mean, card.std)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UsageError(f"'{folder / WEIGHTS}' cannot be loaded: {reason}") from error
    return model.eval()


def same_weights(first: Classifier, second: Classifier) -> bool:
    """Return whether two classifiers hold the same tensors, bit for bit."""
    left, right = first.state_dict(), second.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
