"""A classifier of images in [0, 1]: a normalisation layer followed by a timm network.

Images are (B, C, H, W) floats in [0, 1] everywhere, so that eps means the same for CT, X-ray and
PNG.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


class Normalise(nn.Module):
    """Subtract a fixed mean and divide by a fixed deviation, per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the normalised images (B, C, H, W)."""
        return (images - self.mean) / self.std


class Classifier(nn.Module):
    """Logits (B, K) of images (B, C, H, W) in [0, 1]."""

    def __init__(
        self, backbone: nn.Module, *, architecture: str, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.architecture = architecture
        # The sizes of layers narrower than the architecture's, as ``models/widths.py`` has them.
        self.widths: dict[str, tuple[int, int]] = {}
        self.batch_norm_frozen = False
        self.normalise = Normalise(mean, std)
        self.backbone = backbone

    @property
    def channels(self) -> int:
        """The number of image channels."""
        return self.normalise.mean.shape[1]

    def train(self, mode: bool = True) -> Self:
        """Set the mode of every layer except frozen batch norms."""
        super().train(mode)
        if self.batch_norm_frozen:
            for layer in batch_norms(self):
                layer.eval()
        return self

    def inputs(self, images: Tensor) -> Tensor:
        """Return what the backbone takes, of images (B, C, H, W) in [0, 1]."""
        normalised: Tensor = self.normalise(images)
        return normalised

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, K) of images (B, C, H, W) in [0, 1]."""
        logits: Tensor = self.backbone(self.inputs(images))
        return logits


def freeze_batch_norm(classifier: Classifier) -> None:
    """Keep every batch norm of ``classifier`` in eval mode, also under ``classifier.train()``.

    The running statistics stay fixed, so attacks during training see the network that is deployed.
    Scale and shift are still trained.
    """
    classifier.batch_norm_frozen = True
    classifier.train(classifier.training)


def batch_norms(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the batch-norm layers of ``model``, including those of timm that also activate."""
    return (module for module in model.modules() if isinstance(module, BATCH_NORMS))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put ``model`` in eval mode within this context, then restore the mode of every module.

    ``model.train(was_training)`` would also unfreeze layers that were frozen individually.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training
