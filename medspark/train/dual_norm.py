"""Two batch norms per layer: one for clean, one for attacked images (AdvProp, Xie et al. 2020).

Clean and attacked images have different statistics, and a single batch norm mixes them. With two,
adversarial training costs less accuracy on small medical data sets (Han et al. 2021). One of the
two is deployed: the main one for accuracy, the auxiliary one for robustness.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from medspark.models.classifier import Classifier, batch_norms

__all__ = ["Dual", "DualNorm", "dual", "for_attacked", "idle_sum"]

Deployed = Literal["main", "auxiliary"]


class DualNorm(nn.Module):
    """A batch norm for clean images (``main``) and its copy for attacked ones (``auxiliary``)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.main = norm
        self.auxiliary = copy.deepcopy(norm)
        self.attacked = False

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` with the batch norm that ``attacked`` selects."""
        normed: Tensor = self.auxiliary(x) if self.attacked else self.main(x)
        return normed


@dataclass(frozen=True)
class Dual:
    """A network with two batch norms per layer (``trained``), and the ordinary one (``kept``)."""

    trained: Classifier
    kept: Classifier
    deployed: Deployed

    def norms(self) -> dict[str, Tensor]:
        """Return nothing: ``trained`` holds all that a resumed training needs."""
        return {}

    def unfold(self) -> Classifier:
        """Return ``kept`` with the weights and the deployed batch norms of ``trained``."""
        other = ".main." if self.deployed == "auxiliary" else ".auxiliary."
        state = {
            name.replace(f".{self.deployed}.", "."): tensor
            for name, tensor in self.trained.state_dict().items()
            if other not in name
        }
        self.kept.load_state_dict(state)
        return self.kept


def dual(model: Classifier, *, deployed: Deployed) -> Dual:
    """Return ``model`` together with a copy of it in which every batch norm is a DualNorm."""
    trained = copy.deepcopy(model)
    norms = set(batch_norms(trained))
    names = [name for name, module in trained.named_modules() if module in norms]
    for name in names:
        trained.set_submodule(name, DualNorm(trained.get_submodule(name)))
    return Dual(trained, model, deployed)


@contextmanager
def for_attacked(model: nn.Module) -> Iterator[None]:
    """Make ``model`` use its auxiliary norms, if it has any."""
    layers = _layers(model)
    for layer in layers:
        layer.attacked = True
    try:
        yield
    finally:
        for layer in layers:
            layer.attacked = False


def idle_sum(model: nn.Module) -> Tensor | float:
    """Return the sum of the main norms' parameters; add it to an attacked loss with factor 0.

    Under DDP every parameter must take part in the backward pass that all-reduces.
    """
    idle: Tensor | float = 0.0
    for layer in _layers(model):
        for parameter in layer.main.parameters():
            idle = idle + parameter.sum()
    return idle


def _layers(model: nn.Module) -> list[DualNorm]:
    return [module for module in model.modules() if isinstance(module, DualNorm)]
