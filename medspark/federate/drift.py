"""Keep clients from drifting apart in a round: FedProx and SCAFFOLD, as gradient corrections."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from medspark.federate.aggregate.rule import Vector
from medspark.federate.local import LocalConfig
from medspark.federate.weights import Weights, difference

__all__ = ["Drift"]


class Drift:
    """Corrects each gradient of a client: g + mu (w - w of the round) - c_i + c.

    FedProx (Li et al. 2020) adds the term in mu. SCAFFOLD (Karimireddy et al. 2020) adds the
    control variates, this client's c_i and the server's c, which start at zero.
    """

    def __init__(
        self, model: nn.Module, config: LocalConfig, *, ours: Vector | None, server: Vector | None
    ) -> None:
        self._parameters = list(model.parameters())
        self._prox, self._scaffold = config.prox, config.scaffold
        self._start = [p.detach().clone() for p in self._parameters] if config.prox else []
        size = sum(p.numel() for p in self._parameters) if config.scaffold else 0
        self.ours = np.zeros(size) if ours is None else ours
        self._server = np.zeros(size) if server is None else server
        self._gap = self._as_parameters(self._server - self.ours) if config.scaffold else []

    def correct(self) -> None:
        """Correct the gradients of a step in place."""
        if self._start or self._gap:
            self._add()

    @torch.no_grad()
    def _add(self) -> None:
        for parameter, start in zip(self._parameters, self._start, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self._prox)
        for parameter, gap in zip(self._parameters, self._gap, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(gap)

    def control(self, trained: Weights, weights: Weights, way: float) -> Vector | None:
        """Return the client's next control variate, None without SCAFFOLD.

        It is c_i - c - update / way (option II of the paper), where the update leads from the
        round's ``weights`` to the ``trained`` ones, and ``way`` is steps x learning rate.
        """
        if not self._scaffold:
            return None
        control: Vector = self.ours - self._server - difference(trained, weights) / way
        return control

    def _as_parameters(self, vector: Vector) -> list[Tensor]:
        sizes = [p.numel() for p in self._parameters]
        parts = torch.split(torch.from_numpy(vector.astype(np.float32)), sizes)
        return [part.view(p.shape) for part, p in zip(parts, self._parameters, strict=True)]
