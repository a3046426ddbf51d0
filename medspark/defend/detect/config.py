"""The settings of the attacks through a guard."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from medspark.config import Config

__all__ = ["Action", "AdaptiveName", "AdaptiveSettings", "DetectorName"]

# What becomes of the label of a suspicious image: it is withheld, or given with a warning.
Action = Literal["refuse", "flag"]
DetectorName = Literal[
    "kde", "bu", "lid", "safetynet", "mahalanobis", "deep", "smoothed", "rank_pca",
    "contrastive",
]  # fmt: skip
AdaptiveName = Literal[
    "project_classifier", "project_detector", "selective", "weighted", "leading",
]  # fmt: skip


class AdaptiveSettings(Config):
    """Attacks that fool a network and its detector together."""

    attacks: tuple[AdaptiveName, ...] = Field(
        ("project_classifier", "project_detector", "selective", "weighted", "leading"),
        min_length=1,
        description="orthogonal PGD with the classifier's or the detector's gradient projected, or "
        "selective; PGD on a weighted sum; PGD in the leading components (on rank_pca only)",
    )
    steps: int = Field(40, ge=1, description="steps of each attack")
    searches: int = Field(5, ge=1, description="weights that the weighted attack tries")
