"""The configuration of mode ikl. This module does not import torch, so reading it is fast."""

from __future__ import annotations

from pydantic import Field

from medspark.config import Config

__all__ = ["IklConfig"]


class IklConfig(Config):
    """The loss of mode ikl (Cui et al. 2024); its attack takes train.inner_steps steps."""

    alpha: float = Field(
        4.0, ge=0, description="weight of the cross-entropy of attacked to clean answers"
    )
    beta: float = Field(
        20.0, ge=0, description="weight of the squared distance of the logits' differences"
    )
    temperature: float = Field(
        4.0, gt=0, description="divides the logits in the mean answers per class"
    )
