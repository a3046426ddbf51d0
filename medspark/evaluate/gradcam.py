"""Grad-CAM (Selvaraju et al. 2017): the image regions that support a predicted class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medspark.models.classifier import Classifier


def grad_cam(model: Classifier, images: Tensor, classes: Tensor) -> Tensor:
    """Return maps (B, H, W) in [0, 1] of the evidence for ``classes`` (B,) in ``images``.

    It works on any timm backbone with a last feature map (B, F, h, w).
    """
    backbone = model.backbone
    with torch.no_grad():
        features = backbone.forward_features(model.inputs(images))  # type: ignore[operator]
    features = features.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = backbone.forward_head(features)  # type: ignore[operator]
        (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), features)
    maps = (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu()
    maps = F.interpolate(maps.detach(), images.shape[2:], mode="bilinear", align_corners=False)
    scaled: Tensor = (maps / maps.amax((2, 3), keepdim=True).clamp_min(1e-12)).squeeze(1)
    return scaled
