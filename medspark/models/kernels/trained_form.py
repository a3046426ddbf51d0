"""A network in two forms: one that is trained, and the timm network that is kept and deployed."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from medspark.models.classifier import Classifier

__all__ = ["TrainedForm"]


class TrainedForm(Protocol):
    """What an engine trains in place of the network itself; it may be the network itself."""

    @property
    def trained(self) -> Classifier:
        """The form whose parameters the optimiser updates."""

    @property
    def kept(self) -> Classifier:
        """The network as timm defines it, with the weights of the last ``unfold``."""

    def norms(self) -> dict[str, Tensor]:
        """Return the tensors of ``kept`` that ``trained`` lacks and a checkpoint needs, by name."""

    def unfold(self) -> Classifier:
        """Return ``kept`` with the weights that ``trained`` has by now."""
