"""The interface of a network with two forms: one to train, and one to save and deploy."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from medspark.models.classifier import Classifier

__all__ = ["TrainedForm"]


class TrainedForm(Protocol):
    """A network in the form to train and in the form to save, which may be the same."""

    @property
    def trained(self) -> Classifier:
        """The form whose parameters the optimiser updates."""

    @property
    def kept(self) -> Classifier:
        """The network as timm defines it, with the weights of the last ``unfold``."""

    def norms(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint needs in addition to ``trained``, by name."""

    def unfold(self) -> Classifier:
        """Return ``kept`` with the current weights of ``trained``."""
