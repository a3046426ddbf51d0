"""The configuration of pruning. This module does not import torch, so reading it is fast."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from pydantic import Field

from medspark.config import Config
from medspark.errors import UsageError

__all__ = ["PruneConfig", "PruneMethod", "check_pruning"]

PruneMethod = Literal["rsr", "magnitude", "lasso", "noise", "hydra"]


class PruneConfig(Config):
    """Which weights to remove, how many, and how to choose them."""

    method: PruneMethod = Field(
        "rsr",
        description="rsr: noise with learnt scales and lasso; lasso and noise: one of the two; "
        "hydra: learnt scores; magnitude: the smallest weights, relative to their layer's, before "
        "training",
    )
    sparsity: float = Field(
        0.85,
        ge=0,
        lt=1,
        description="share of the weights of convolutions and linear layers to set to zero; with "
        "structured, share of the multiply-adds to remove",
    )
    structured: bool = Field(
        False, description="remove whole channels, by magnitude, so that the network is faster"
    )
    cut_after: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="share of the steps before weights become zero for good; magnitude has none",
    )
    lasso: float | None = Field(
        None,
        ge=0,
        description="weight of the lasso in rsr and lasso, in root mean squares of a layer's "
        "weights per unit of learning rate; by default the one that alone would make that share "
        "of the weights zero",
    )
    noise: float = Field(
        0.25,
        ge=0,
        description="first scale of the noise in rsr and noise, in deviations of a layer's weights",
    )

    @property
    def noisy(self) -> bool:
        """Whether the network is trained with noisy weights."""
        return self.method in ("rsr", "noise")


def check_pruning(prune: PruneConfig, *, restores: bool) -> None:
    """Raise UsageError if the settings exclude each other, or a package is missing.

    ``restores`` states that the training's monitor may restore earlier weights and end it.
    """
    if prune.structured and prune.method != "magnitude":
        raise UsageError(
            f"structured removes channels by magnitude: method cannot be {prune.method}, give "
            "--method magnitude."
        )
    if prune.structured and find_spec("torch_pruning") is None:
        raise UsageError("structured needs torch-pruning: pip install 'medspark[prune]'.")
    if restores and prune.method != "magnitude":
        raise UsageError(
            "train.monitor.action restore could end the training before the network is pruned: "
            "use warn or noise."
        )
