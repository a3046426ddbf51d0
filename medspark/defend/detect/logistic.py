"""Logistic regression on standardised values, kept as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

__all__ = ["Logistic"]


@dataclass(frozen=True)
class Logistic:
    """The log-odds of being attacked, a linear function of standardised values."""

    mean: Tensor  # (D,)
    scale: Tensor  # (D,)
    weight: Tensor  # (D,)
    bias: Tensor  # ()

    @classmethod
    def fit(cls, values: Tensor, attacked: Tensor) -> Self:
        """Return the regression of ``attacked`` (M,) on ``values`` (M, D), with an L2 penalty."""
        from sklearn.linear_model import LogisticRegression

        mean, scale = values.mean(0), values.std(0, correction=0).clamp_min(1e-9)
        standard = ((values - mean) / scale).double().cpu().numpy()
        model = LogisticRegression(max_iter=1000).fit(standard, attacked.cpu().numpy())
        weight = torch.from_numpy(model.coef_[0]).to(values)
        return cls(mean, scale, weight, torch.tensor(float(model.intercept_[0])).to(values))

    def __call__(self, values: Tensor) -> Tensor:
        """Return the log-odds (B,) of ``values`` (B, D)."""
        return ((values - self.mean) / self.scale) @ self.weight + self.bias
