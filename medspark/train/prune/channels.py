"""Structured pruning: remove whole channels, so that a network gets faster and not only sparser.

torch-pruning (Fang et al. 2023) finds which channels of which layers have to go together. Of each
group of layers, the channels with the smallest weights go, the same share in every group.

Widths stay multiples of 16 or of 8. Convolutions of onnxruntime and oneDNN compute blocks of that
many channels: with any number of channels, MobileNet-V2 with half of its multiply-adds took 2.7
times as long as the whole network (onnxruntime, 64 px, AVX-512).
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor

from medspark.errors import UsageError
from medspark.models.classifier import Classifier
from medspark.models.cost import multiply_adds
from medspark.models.widths import Widths, narrow, widths_of

__all__ = ["remove_channels"]

# The share of channels is found to this accuracy.
_STEPS = 50
_MOST = 0.98
# Widths are multiples of the first of these that removes at most so much more than was asked for.
_MULTIPLES = {16: 0.05, 8: 0.15, 1: 1.0}


def remove_channels(model: Classifier, image: Tensor, share: float) -> Classifier:
    """Return ``model`` without channels that make up ``share`` of its multiply-adds, or a bit more.

    ``image`` (1, C, H, W) is any image. All layers but the classifier's outputs get narrower.
    Raises UsageError if the network cannot lose that many, or cannot be narrowed.
    """
    if share == 0:
        return model
    whole, names = multiply_adds(model, image), widths_of(model)
    for multiple, more in _MULTIPLES.items():
        narrower = _narrowed(model, image, (1 - share) * whole, multiple)
        least = (1 - share - more) * whole
        if narrower is not None and multiply_adds(narrower, image) >= least:
            break
    if narrower is None:
        raise UsageError(f"sparsity: this network cannot lose {share:g} of its multiply-adds.")
    found = widths_of(narrower)
    narrower.widths = model.widths | {n: found[n] for n, own in names.items() if found[n] != own}
    _check(model, narrower, narrower.widths, image)
    return narrower


def _narrowed(model: Classifier, image: Tensor, most: float, multiple: int) -> Classifier | None:
    """Return ``model`` with at most ``most`` multiply-adds; None if it cannot be so narrow."""
    narrower = copy.deepcopy(model).eval()
    pruner = _pruner(narrower, image, multiple)
    for _ in range(_STEPS):
        pruner.step()
        if multiply_adds(narrower, image) <= most:
            return narrower
    return None


def _pruner(model: Classifier, image: Tensor, multiple: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports
        import torch_pruning

    backbone: Any = model.backbone
    return torch_pruning.pruner.BasePruner(
        model,
        image,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=_MOST,
        iterative_steps=_STEPS,
        round_to=multiple,
        ignored_layers=[backbone.get_classifier()],
    )


@torch.no_grad()
def _check(model: Classifier, narrower: Classifier, widths: Widths, image: Tensor) -> None:
    """Raise UsageError unless ``narrower`` is ``model`` with other ``widths`` and nothing else."""
    again = copy.deepcopy(model)
    try:
        narrow(again, widths)
        again.load_state_dict(narrower.state_dict())
        same = torch.allclose(again.eval()(image), narrower(image), atol=1e-5)
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"structured: {model.architecture} cannot be narrowed: {str(error).splitlines()[0]}."
        ) from error
    if not same:
        raise UsageError(f"structured: {model.architecture} cannot be narrowed.")
