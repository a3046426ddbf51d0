"""The interface of a network with two forms: one to train, and one to save and deploy."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from medspark.models.classifier import Classifier

__all__ = ["Copied", "TrainedForm"]


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


@dataclass(frozen=True)
class Copied:
    """A network in training whose layers get parameters that the deployed network does not have."""

    trained: Classifier
    kept: Classifier

    @classmethod
    def of(cls, form: TrainedForm) -> TrainedForm:
        """Return ``form`` if its two networks differ, or else the network and a copy to train."""
        return form if form.trained is not form.kept else cls(copy.deepcopy(form.kept), form.kept)

    def norms(self) -> dict[str, Tensor]:
        """Return nothing: ``trained`` holds all that a resumed training needs."""
        return {}

    def unfold(self) -> Classifier:
        """Return ``kept`` with the current weights of ``trained``, without its other parameters."""
        state, own = self.trained.state_dict(), self.kept.state_dict()
        self.kept.load_state_dict({name: state[name] for name in own})
        return self.kept
