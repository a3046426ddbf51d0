"""Save and load a trained classifier: model.safetensors and model.json, without pickle.

Readers ignore a folder without model.json. The card is renamed into place last, so a folder with a
card is complete.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from medspark import __version__
from medspark.errors import UsageError
from medspark.files import replacing
from medspark.models.backbones import build
from medspark.models.card import WEIGHTS, ModelCard, read_card, write_card
from medspark.models.classifier import Classifier, Normalise
from medspark.models.config import ModelConfig


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
    """Return the card of ``model``; ``classes`` are in the order of its logits."""
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
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    with replacing(folder / WEIGHTS) as draft:
        save_file(state, draft, metadata={"architecture": card.architecture})
    write_card(folder, card)


def calibrate(folder: Path, temperature: float) -> None:
    """Write ``temperature``, the divisor of the logits, to the card in ``folder``."""
    card = read_card(folder).model_copy(update={"temperature": temperature})
    write_card(folder, card)


def load_classifier(folder: Path) -> Classifier:
    """Return the classifier in ``folder``, in eval mode, on the CPU.

    Raises UsageError if the folder holds no model, or if the weights do not fit the card.
    """
    card = read_card(folder)
    config = ModelConfig(name=card.architecture, dropout=card.dropout)
    model = build(
        config,
        num_classes=len(card.classes),
        channels=card.channels,
        size=(card.height, card.width),
    )
    model.normalise = Normalise(card.mean, card.std)
    path = folder / WEIGHTS
    try:
        _check_shapes(path, model)
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f"'{path}' cannot be loaded: {error}.") from error
    own = model.state_dict()
    other = next((name for name, tensor in tensors.items() if tensor.dtype != own[name].dtype), "")
    if other:
        raise UsageError(
            f"'{path}' does not fit its card: {other} has {tensors[other].dtype} instead of "
            f"{own[other].dtype}."
        )
    model.load_state_dict(tensors)
    return model.eval()


def _check_shapes(path: Path, model: Classifier) -> None:
    """Raise ValueError if names or shapes in the file's header are not those of ``model``.

    Call it before reading tensors: an untrusted file may claim any size.
    """
    with safe_open(path, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            stored, expected = found.get(name, "missing"), wanted.get(name, "no such tensor")
            raise ValueError(f"{name[:100]} is {stored}, but the card needs {expected}")
