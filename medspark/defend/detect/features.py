"""What a network shows of images in one pass: its logits and the mean activations of its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medspark.errors import UsageError
from medspark.models.classifier import Normalise, evaluating
from medspark.models.guarded import GuardedClassifier, Passed

__all__ = [
    "EMBEDDING", "LOGITS", "PENULTIMATE", "SMOOTHED", "Features", "Layers", "Tap",
    "chosen_layers", "find_layers", "joined",
]  # fmt: skip

# Names of layers that every network with a linear head has, and of one that guarded networks have.
PENULTIMATE, LOGITS, EMBEDDING = "penultimate", "logits", "contrast"

# A "layer" that takes a pass of its own: how all features change when the image is smoothed.
SMOOTHED = "smoothed"


@dataclass(frozen=True)
class Features:
    """Logits (B, K) of images, and their features (B, D) by the name of the layer.

    ``draw`` names what a detector draws by chance; with another number it draws anew.
    """

    logits: Tensor
    layers: Mapping[str, Tensor]
    draw: int = 0

    @property
    def predicted(self) -> Tensor:
        """The predicted class of each image, (B,)."""
        return self.logits.argmax(1)

    def of(self, chosen: Tensor) -> Features:
        """Return the features of some images; ``chosen`` holds positions, or is a mask."""
        layers = {name: values[chosen] for name, values in self.layers.items()}
        return Features(self.logits[chosen], layers, self.draw)


def joined(parts: Sequence[Features]) -> Features:
    """Return the features of the images of all ``parts``, which have the same layers."""
    layers = {n: torch.cat([part.layers[n] for part in parts]) for n in parts[0].layers}
    return Features(torch.cat([part.logits for part in parts]), layers, parts[0].draw)


@dataclass(frozen=True)
class Layers:
    """The layers of a network that detectors can look at.

    ``head`` is the name of the linear layer that makes the logits, or "" if there is none.
    ``embeds`` states whether the network has a contrastive embedding of images.
    """

    stages: tuple[str, ...]
    head: str
    embeds: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all layers, from the image to the logits, and then the embedding."""
        penultimate = [PENULTIMATE] if self.head else []
        return (*self.stages, *penultimate, LOGITS, *([EMBEDDING] if self.embeds else []))


@dataclass(frozen=True)
class Tap:
    """A network whose layers are read while it predicts: one pass gives logits and all features.

    A layer's output (B, C, H, W) is averaged over H and W. Gradients reach the images.
    """

    model: nn.Module
    layers: tuple[str, ...]
    head: str

    def __call__(self, images: Tensor) -> Features:
        """Return the features of ``images`` (B, C, H, W) in [0, 1], by one forward pass."""
        found: dict[str, Tensor] = {}
        with _reading(self.model, self.layers, self.head, found):
            if EMBEDDING in self.layers:
                passed: Passed = self.model(images, "whole")
                logits, found[EMBEDDING] = passed.logits, passed.embedding
            else:
                logits = self.model(images)
        found[LOGITS] = logits
        return Features(logits, {name: found[name] for name in self.layers})


@contextmanager
def _reading(
    model: nn.Module, layers: Sequence[str], head: str, found: dict[str, Tensor]
) -> Iterator[None]:
    """Store the features of ``layers`` in ``found`` during a pass."""

    def reader(name: str) -> Any:
        # Averaged at once: a following layer may overwrite its input in place.
        return lambda _module, _inputs, output: found.__setitem__(name, _pooled(output))

    hooks = [
        model.get_submodule(name).register_forward_hook(reader(name))
        for name in layers
        if name not in (PENULTIMATE, LOGITS, EMBEDDING)
    ]
    if PENULTIMATE in layers:
        hooks.append(
            model.get_submodule(head).register_forward_pre_hook(
                lambda _module, inputs: found.__setitem__(PENULTIMATE, inputs[0].flatten(1))
            )
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def find_layers(model: nn.Module, images: Tensor) -> Layers:
    """Return the last layer of each resolution, and the head, from one pass of ``images``.

    A stage whose mean activations are the input of the head is left out: it is the penultimate
    layer.
    """
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            if isinstance(module, nn.Linear):
                inputs[name], outputs[name] = given[0].detach(), output.detach()
            elif _is_map(output) and not isinstance(module, Normalise):
                outputs[name] = output.detach().mean((2, 3))
                sides[name] = tuple(output.shape[2:])

        return hook

    sides: dict[str, tuple[int, ...]] = {}
    hooks = [
        module.register_forward_hook(record(name)) for name, module in model.named_modules() if name
    ]
    try:
        with evaluating(model), torch.no_grad():
            logits = model(images)
    finally:
        for handle in hooks:
            handle.remove()
    heads = [name for name in inputs if torch.equal(outputs[name], logits)]
    head = heads[-1] if heads else ""
    # Containers come after their parts, so the last name of a resolution is the whole stage.
    stages = {side: name for name, side in sides.items()}
    names = (name for name in sides if name in stages.values())
    kept = tuple(n for n in names if not _same(outputs[n], inputs.get(head)))
    return Layers(kept, head, embeds=isinstance(model, GuardedClassifier))


def chosen_layers(asked: Sequence[str], known: Layers, model: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers that a user asked for; ``auto`` means all of ``known``.

    Raises UsageError for a name that the network does not have.
    """
    if tuple(asked) == ("auto",):
        return known.names
    modules = dict(model.named_modules())
    for name in asked:
        if name not in known.names and not modules.get(name):
            raise UsageError(
                f"layers: the network has no layer '{name}'; there are {', '.join(known.names)} "
                "and every module by its path."
            )
    return tuple(dict.fromkeys(asked))


def _is_map(output: Any) -> bool:
    return isinstance(output, Tensor) and output.ndim == 4 and output[0, 0].numel() > 1


def _same(pooled: Tensor, penultimate: Tensor | None) -> bool:
    return (
        penultimate is not None
        and pooled.shape == penultimate.shape
        and torch.allclose(pooled, penultimate, atol=1e-5)
    )


def _pooled(output: Tensor) -> Tensor:
    return output.mean((2, 3)) if output.ndim == 4 else output.flatten(1)
