"""Structured pruning: remove whole channels, so that a network gets faster and not only sparser.

torch-pruning (Fang et al. 2023) finds which channels of which layers have to go together. Of each
group of layers, the channels with the smallest weights go, the same share in every group. Channels
that several layers add up to (the stream past residual blocks) stay if what is inside of the blocks
suffices, as in ThiNet (Luo et al. 2017).

Widths stay multiples of 16 or of 8. Convolutions of onnxruntime and oneDNN compute blocks of that
many channels: with any number of channels, MobileNet-V2 with half of its multiply-adds took 2.7
times as long as the whole network (onnxruntime, 64 px, AVX-512).
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medspark.errors import UsageError
from medspark.models.classifier import Classifier
from medspark.models.cost import multiply_adds
from medspark.models.widths import Widths, narrow, widths_of

__all__ = ["remove_channels"]

# The share of channels is found to this accuracy.
_STEPS = 50
_MOST = 0.98
_MAKERS = (nn.Conv2d, nn.Linear)


class _Way(NamedTuple):
    """Which channels may go, widths are multiples of what, and how much more than asked may go."""

    inside: bool  # of residual blocks alone
    multiple: int
    more: float


# The first one counts that removes enough, and not too much.
_WAYS = (
    _Way(inside=True, multiple=16, more=0.05),
    _Way(inside=True, multiple=8, more=0.15),
    _Way(inside=False, multiple=16, more=0.05),
    _Way(inside=False, multiple=8, more=0.15),
    _Way(inside=False, multiple=1, more=1.0),
)


def remove_channels(model: Classifier, image: Tensor, share: float) -> Classifier:
    """Return ``model`` without channels that make up ``share`` of its multiply-adds, or a bit more.

    ``image`` (1, C, H, W) is any image. All layers but the classifier's outputs get narrower.
    Raises UsageError if the network cannot lose that many, or cannot be narrowed.
    """
    if share == 0:
        return model
    whole, names = multiply_adds(model, image), widths_of(model)
    for way in _WAYS:
        narrower = _narrowed(model, image, (1 - share) * whole, way)
        least = (1 - share - way.more) * whole
        if narrower is not None and multiply_adds(narrower, image) >= least:
            break
    if narrower is None:
        raise UsageError(f"sparsity: this network cannot lose {share:g} of its multiply-adds.")
    found = widths_of(narrower)
    narrower.widths = model.widths | {n: found[n] for n, own in names.items() if found[n] != own}
    _check(model, narrower, narrower.widths, image)
    return narrower


def _narrowed(model: Classifier, image: Tensor, most: float, way: _Way) -> Classifier | None:
    """Return ``model`` with at most ``most`` multiply-adds; None if it cannot be so narrow."""
    narrower = copy.deepcopy(model).eval()
    pruner = _pruner(narrower, image, way)
    for _ in range(_STEPS):
        pruner.step()
        if multiply_adds(narrower, image) <= most:
            return narrower
    return None


def _pruner(model: Classifier, image: Tensor, way: _Way) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports
        import torch_pruning

    backbone: Any = model.backbone
    kept = [backbone.get_classifier()]
    if way.inside:
        graph = torch_pruning.DependencyGraph().build_dependency(model, image)
        kept += _added_up(graph, kept)
    return torch_pruning.pruner.BasePruner(
        model,
        image,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=_MOST,
        iterative_steps=_STEPS,
        round_to=way.multiple,
        ignored_layers=kept,
    )


def _added_up(graph: Any, ignored: list[nn.Module]) -> list[nn.Module]:
    """Return the layers whose outputs are added to those of other layers."""
    found: dict[nn.Module, None] = {}
    for group in graph.get_all_groups(ignored_layers=ignored, root_module_types=list(_MAKERS)):
        makers: dict[nn.Module, None] = {
            part.target.module: None
            for part, _ in group
            if graph.is_out_channel_pruning_fn(part.handler)
            and isinstance(part.target.module, _MAKERS)
            and getattr(part.target.module, "groups", 1) == 1  # depthwise ones pass channels on
        }
        if len(makers) > 1:
            found |= makers
    return list(found)


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
