"""Build any timm network as a Classifier: random, pretrained or from a safetensors file.

Networks such as vision transformers are made for one size of images, which timm takes as an option.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medspark.errors import UsageError
from medspark.models.classifier import Classifier
from medspark.models.config import (
    PRETRAINED,
    ModelConfig,
    check_model,
    model_folder,
    tensor_names,
    timm_model,
    timm_name,
    with_patches,
)
from medspark.models.local import local_model
from medspark.models.torchvision_ops import import_timm
from medspark.remote import any_path

Size = tuple[int, int]

_LOGGER = logging.getLogger(__name__)

_GRID = 8  # patches along a side that a vision transformer learns from, without other weights
_HEAD_STD = 0.01  # of a new head's weights on a pretrained network


def build(
    config: ModelConfig, *, num_classes: int, channels: int, size: Size | None = None
) -> Classifier:
    """Return the classifier that ``config`` describes, for ``channels`` image channels.

    timm adapts pretrained stems to the channels (summed for greyscale), and pretrained position
    embeddings to ``size``, the (height, width) of images in pixels; without it, networks that are
    made for one size have timm's. A head for another number of classes is new; on pretrained
    weights it begins small.

    Raises UsageError for a model that timm does not have, weights that do not fit it, or a network
    that cannot be made for ``size``.
    """
    check_model(config)
    if model_folder(config) is not None:
        raise UsageError(
            f"model.weights: '{config.weights}' is a model folder, from which this job cannot "
            "start; use a .safetensors file."
        )
    architecture = timm_name(config.name)
    made, patches = timm_model(architecture)
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": channels}
    options |= patches | _made_for(made, size)
    try:
        backbone = _create(made, config, options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        raise UsageError(f"model.name: {config.name} takes images of one size only.") from error
    return wrap(backbone, architecture=architecture, channels=channels)


def check_size(config: ModelConfig, *, channels: int, size: Size) -> None:
    """Raise UsageError if the network cannot take images of ``size`` (height, width) in pixels.

    A pass without memory or computation (torch's device "meta") shows it, at any size.
    """
    untrained = config.model_copy(update={"weights": None})
    try:
        with torch.device("meta"), torch.no_grad():
            model = build(untrained, num_classes=2, channels=channels, size=size)
            model.eval()(torch.zeros(2, channels, *size))
        if config.weights is None:
            _warn_of_few_patches(config.name, model, size)
    except NotImplementedError:
        return  # an operator that "meta" does not have; ranks will see
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UsageError(
            f"model.name: {config.name} cannot take images of {size[0]} x {size[1]} pixels: "
            f"{reason}."
        ) from error


def _warn_of_few_patches(name: str, model: Classifier, size: Size) -> None:
    grid = getattr(getattr(model.backbone, "patch_embed", None), "grid_size", None)
    patch = max(1, min(size) // _GRID)
    finer = with_patches(name, patch)
    if grid is None or min(grid) >= _GRID or finer is None:
        return
    _LOGGER.warning(
        "%s sees images of %d x %d pixels as %d x %d patches, too few to learn from random "
        "weights. %s sees %d x %d.",
        name, *size, *grid, finer, *(side // patch for side in size),
    )  # fmt: skip


def wrap(backbone: nn.Module, *, architecture: str, channels: int) -> Classifier:
    """Return ``backbone`` as a Classifier, with its pretraining mean and std as first layer."""
    cfg: dict[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
    mean, std = cfg["mean"], cfg["std"]
    if channels != len(mean):
        mean = [sum(mean) / len(mean)] * channels
        std = [sum(std) / len(std)] * channels
    return Classifier(backbone, architecture=architecture, mean=list(mean), std=list(std))


def _made_for(architecture: str, size: Size | None) -> dict[str, Size]:
    """Return timm's option for a network that is made for one size of images."""
    cfg = import_timm().get_pretrained_cfg(architecture)
    if size is None or cfg is None or not cfg.fixed_input_size or size == cfg.input_size[1:]:
        return {}
    return {"img_size": size}


def _create(architecture: str, config: ModelConfig, options: dict[str, Any]) -> nn.Module:
    timm = import_timm()
    if config.dropout > 0:  # not every network accepts the argument
        options["drop_rate"] = config.dropout
    if config.weights is None:
        untrained: nn.Module = timm.create_model(architecture, pretrained=False, **options)
        return untrained
    if config.weights == PRETRAINED:
        return _download(architecture, options)
    path = local_model(any_path(config.weights))
    overlay = {"file": str(path)}
    try:
        model: nn.Module = timm.create_model(
            architecture, pretrained=True, pretrained_cfg_overlay=overlay, **options
        )
    except RuntimeError as error:  # load_state_dict raises it for other shapes
        reason = str(error).splitlines()[-1].strip()
        raise UsageError(
            f"model.weights: '{path}' does not fit {architecture}: {reason}"
        ) from error
    _refuse_partial_load(model, tensor_names(path), path)
    return _with_small_head(model, options["num_classes"])


def _download(architecture: str, options: dict[str, Any]) -> nn.Module:
    timm = import_timm()
    try:
        model: nn.Module = timm.create_model(architecture, pretrained=True, **options)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"model.weights: cannot fetch the pretrained weights of {architecture} "
            f"({type(error).__name__}); use a local .safetensors file instead."
        ) from error
    return _with_small_head(model, options["num_classes"])


@torch.no_grad()
def _with_small_head(model: nn.Module, num_classes: int) -> nn.Module:
    """Return a pretrained ``model``; if its head is new, its weights are small.

    Heads of timm's MobileNet-V2 and its relatives begin with weights of 1 / sqrt(classes). With two
    classes the first loss is 13, and its gradients damage what the network had learnt.
    """
    if num_classes == model.pretrained_cfg["num_classes"]:  # type: ignore[index]
        return model
    heads = tuple(f"{name}." for name in _heads(model))
    for name, parameter in model.named_parameters():
        if not name.startswith(heads or "\0"):
            continue
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=_HEAD_STD)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


def _heads(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers that give the logits."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    heads = cfg.get("classifier") or ()
    return (heads,) if isinstance(heads, str) else tuple(heads)


def _refuse_partial_load(model: nn.Module, found: set[str], path: Path) -> None:
    # With another number of classes, timm loads the tensors that fit and only logs the others, so
    # the file of another network would silently give random weights.
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    wanted = {name for name in model.state_dict() if not name.startswith(_heads(model) or "\0")}
    missing = {name for name in wanted - found if not name.endswith("num_batches_tracked")}
    if missing:
        raise UsageError(
            f"model.weights: '{path}' does not fit {cfg.get('architecture')}: it lacks "
            f"{len(missing)} of {len(wanted)} tensors, for example '{min(missing)}'."
        )
