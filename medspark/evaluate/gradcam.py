"""Grad-CAM (Selvaraju et al. 2017): the image regions that support a predicted class."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medspark.models.classifier import Classifier


def grad_cam(model: Classifier, images: Tensor, classes: Tensor) -> Tensor:
    """Return maps (B, H, W) in [0, 1] of the evidence for ``classes`` (B,) in ``images``.

    It works on any timm backbone with a last feature map, (B, F, h, w) or, as Swin's, (B, h, w, F).
    Of a vision transformer it reads the patches before the last block, after which only the class
    token may count.
    """
    backbone, inputs = model.backbone, model.inputs(images)
    if hasattr(backbone, "num_prefix_tokens"):
        maps = _of_patches(backbone, inputs, classes)
    else:
        with torch.no_grad():
            features = backbone.forward_features(inputs)  # type: ignore[operator]
        features = features.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = backbone.forward_head(features)  # type: ignore[operator]
        if getattr(backbone, "output_fmt", "NCHW") == "NHWC":
            maps = _evidence(logits, features, classes, (1, 2), 3)
        else:
            maps = _evidence(logits, features, classes, (2, 3), 1)
    maps = F.interpolate(maps[:, None], images.shape[2:], mode="bilinear", align_corners=False)
    scaled: Tensor = (maps / maps.amax((2, 3), keepdim=True).clamp_min(1e-12)).squeeze(1)
    return scaled


def _of_patches(backbone: Any, inputs: Tensor, classes: Tensor) -> Tensor:
    """Return the evidence (B, h, w) in the patches of a vision transformer."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        seen.append(output)

    handle = backbone.blocks[-1].norm1.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            # The images have a gradient, so that the tokens have one if the weights are frozen.
            logits = backbone(inputs.detach().requires_grad_(True))
    finally:
        handle.remove()
    evidence = _evidence(logits, seen[0], classes, (1,), 2)[:, backbone.num_prefix_tokens :]
    maps: Tensor = evidence.reshape(len(evidence), *backbone.patch_embed.grid_size)
    return maps


def _evidence(
    logits: Tensor, features: Tensor, classes: Tensor, places: tuple[int, ...], channel: int
) -> Tensor:
    """Return the sum over channels of ``features`` times their mean gradient over ``places``."""
    (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), features)
    return (gradient.mean(places, keepdim=True) * features).sum(channel).relu().detach()
