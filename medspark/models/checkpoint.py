"""Save and load a trained classifier: model.safetensors and model.json, without pickle.

Readers ignore a folder without model.json. The card is renamed into place last, so a folder with a
card is complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from medspark import __version__
from medspark.errors import UsageError
from medspark.files import replacing
from medspark.models.backbones import Size, build
from medspark.models.card import (
    WEIGHTS,
    Decision,
    Kind,
    ModelCard,
    Pruning,
    read_card,
    write_card,
)
from medspark.models.classifier import Classifier, Normalise
from medspark.models.config import ModelConfig, check_weights, model_folder
from medspark.models.guarded import GuardedClassifier, guard_classifier
from medspark.models.local import local_model
from medspark.models.noisy import add_noise, plain_layers
from medspark.models.widths import narrow


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
    pruning: Pruning | None = None,
) -> ModelCard:
    """Return the card of ``model``; ``classes`` are in the order of its logits."""
    if pruning is not None:
        pruning = pruning.model_copy(update={"widths": model.widths})
    denoiser = model.denoiser.shape if isinstance(model, GuardedClassifier) else None
    plain: Kind = "classifier" if pruning is None else "pruned"
    return ModelCard(
        kind=plain if denoiser is None else "guarded",
        pruning=pruning,
        denoiser=denoiser,
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


def save_classifier(
    folder: Path, model: Classifier, card: ModelCard, *, noise: Mapping[str, Tensor] | None = None
) -> None:
    """Write ``model`` and its ``card`` to ``folder``, atomically, the card last.

    ``noise`` holds the scales of noisy weights by name, if ``card`` says that there are some.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in (model.state_dict() | dict(noise or {})).items()
    }
    with replacing(folder / WEIGHTS) as draft:
        save_file(state, draft, metadata={"architecture": card.architecture})
    write_card(folder, card)


def calibrate(folder: Path, temperature: float, decision: Decision | None = None) -> None:
    """Write ``temperature``, the divisor of the logits, and ``decision`` to the card."""
    update = {"temperature": temperature, "decision": decision}
    write_card(folder, read_card(folder).model_copy(update=update))


def load_classifier(folder: Path, *, noisy: bool = False) -> Classifier:
    """Return the classifier in ``folder``, in eval mode, on the CPU.

    If it was trained with noisy weights, it computes without the noise, or with it if ``noisy``.
    Raises UsageError if the folder holds no model, or if the weights do not fit the card.
    """
    folder = local_model(folder)
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
        if card.pruning is not None:
            _shape(model, card.pruning)
        if card.denoiser is not None:
            # On "meta" it takes no memory: the card may ask for layers that the file does not hold.
            with torch.device("meta"):
                size = card.height, card.width
                model = guard_classifier(model, card.denoiser, size=size)
        _check_shapes(path, model)
        tensors = load_file(path)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise UsageError(f"'{path}' cannot be loaded: {error}.") from error
    own = model.state_dict()
    other = next((name for name, tensor in tensors.items() if tensor.dtype != own[name].dtype), "")
    if other:
        raise UsageError(
            f"'{path}' does not fit its card: {other} has {tensors[other].dtype} instead of "
            f"{own[other].dtype}."
        )
    model.load_state_dict(tensors, assign=card.denoiser is not None)
    if not noisy:
        plain_layers(model)
    return model.eval()


def first_network(
    config: ModelConfig, *, num_classes: int, channels: int, size: Size
) -> Classifier:
    """Return the network to train: one of a model folder, or else a new one, as ``build`` does.

    Raises UsageError for weights that do not fit, or a model of other classes or channels.
    """
    folder = model_folder(config)
    if folder is None:
        return build(config, num_classes=num_classes, channels=channels, size=size)
    check_weights(config)
    card = read_card(folder)
    if (len(card.classes), card.channels) != (num_classes, channels):
        raise UsageError(
            f"model.weights: the model '{folder}' has {len(card.classes)} classes and "
            f"{card.channels} channel(s), but the shards have {num_classes} and {channels}."
        )
    model = load_classifier(folder)
    if isinstance(model, GuardedClassifier):
        model.contrast.requires_grad_(False)  # no logit depends on it
    return model


def _shape(model: Classifier, pruning: Pruning) -> None:
    """Give ``model`` the layers of a pruned network. Raises ValueError if it has no such layers."""
    narrow(model, pruning.widths)
    model.widths = dict(pruning.widths)
    if pruning.noise:
        add_noise(model, 0.0)


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
