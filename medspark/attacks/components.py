"""The principal components of single images, as a detector and the attacks on it need them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Components"]


@dataclass(frozen=True)
class Components:
    """The singular value decomposition of each image's matrix, and its mean row."""

    left: Tensor  # (B, H, n)
    right: Tensor  # (B, n, W C): singular values times right singular vectors
    mean: Tensor  # (B, 1, W C)
    channels: int

    @classmethod
    def of(cls, images: Tensor, *, centred: bool) -> Components:
        """Return the components of ``images`` (B, C, H, W)."""
        rows = _matrix(images)
        mean = rows.mean(1, keepdim=True) if centred else torch.zeros_like(rows[:, :1])
        left, values, right = torch.linalg.svd(rows - mean, full_matrices=False)
        return cls(left, values[:, :, None] * right, mean, images.shape[1])

    @property
    def count(self) -> int:
        """The number of components, min(H, W C)."""
        return self.left.shape[2]

    def image(self, rank: int) -> Tensor:
        """Return the images (B, C, H, W) of the ``rank`` largest components."""
        return _image(self.left[..., :rank] @ self.right[:, :rank] + self.mean, self.channels)

    def projected(self, images: Tensor, rank: int) -> Tensor:
        """Return ``images`` projected on the column space of the ``rank`` largest components.

        For the decomposed images themselves this is ``image(rank)``. The basis is constant, so
        gradients reach ``images``.
        """
        mean = _image(self.mean, self.channels)
        return self.leading(images - mean, rank) + mean

    def leading(self, change: Tensor, rank: int) -> Tensor:
        """Return the part of ``change`` (B, C, H, W) in the span of the ``rank`` largest."""
        basis = self.left[..., :rank]
        return _image(basis @ (basis.transpose(1, 2) @ _matrix(change)), self.channels)

    def of_images(self, chosen: Tensor) -> Components:
        """Return the components of some images; ``chosen`` is a mask, or holds positions."""
        parts = self.left[chosen], self.right[chosen], self.mean[chosen]
        return Components(*parts, self.channels)


def _matrix(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) as matrices (B, H, W C)."""
    return images.permute(0, 2, 3, 1).flatten(2)


def _image(rows: Tensor, channels: int) -> Tensor:
    count, height = rows.shape[:2]
    return rows.reshape(count, height, -1, channels).permute(0, 3, 1, 2)
