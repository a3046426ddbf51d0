"""The network's mean answer to each class over an epoch: the weights of mode ikl."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from medspark.train.ikl_config import IklConfig
from medspark.train.objective import class_shares
from medspark.train.world import World

__all__ = ["ClassAnswers"]

_MEANS, _SUMS, _EPOCH = "answers/means", "answers/sums", "answers/epoch"
# Answers and shares are summed as whole numbers of these units in float64. Such sums are exact (up
# to 2^29 images an epoch), so they do not depend on the number of ranks or the order.
_ANSWER_UNIT, _SHARE_UNIT = 2.0**-16, 2.0**-8


class ClassAnswers:
    """Mean answers (K, K): row c is the mean of softmax(logits / T) over images of class c.

    In an epoch, those of the epoch before are used; in the first epoch all answers are 1 / K.
    """

    def __init__(self, config: IklConfig | None = None) -> None:
        self.config = config or IklConfig()
        self._epoch = -1
        self._means: Tensor | None = None
        self._sums: Tensor | None = None  # of all ranks
        self._pending: Tensor | None = None  # of this rank, since ``share``

    def of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean answer (B, K) to the class of each image, and count its own answer.

        Labels are classes (B,), or the probabilities of classes (B, 1, K) of mixed images.
        """
        classes = logits.shape[1]
        if self._means is None:
            self._means = logits.new_full((classes, classes), 1 / classes, dtype=torch.float64)
        shares = class_shares(labels, classes).double()
        answers = (logits.detach().double() / self.config.temperature).softmax(1)
        units = (shares / _SHARE_UNIT).round().T @ (answers / _ANSWER_UNIT).nan_to_num().round()
        self._pending = units if self._pending is None else self._pending + units
        return (shares @ self._means.to(shares.device)).to(logits.dtype)

    def begin(self, epoch: int, world: World) -> None:
        """Begin an ``epoch``, on all ranks: use the means of the one before."""
        if epoch == self._epoch:
            return
        self.share(world)
        if self._sums is not None and self._means is not None:
            counts = self._sums.sum(1, keepdim=True)
            self._means = torch.where(counts > 0, self._sums / counts, self._means)
            self._sums = torch.zeros_like(self._sums)
        self._epoch = epoch

    def share(self, world: World) -> None:
        """Add up the answers of all ranks; call it on all of them, and before ``tensors``."""
        if world.distributed:
            # A rank without images does not know the number of classes yet.
            sides = world.gather(0 if self._pending is None else len(self._pending))
            side = max(sides)
            if side == 0:
                return
            if self._pending is None:
                self._pending = torch.zeros(side, side, dtype=torch.float64, device=world.device)
            self._pending = world.sum(self._pending)
        if self._pending is None:
            return
        self._sums = self._pending if self._sums is None else self._sums + self._pending
        if self._means is None:
            self._means = torch.full_like(self._sums, 1 / len(self._sums))
        self._pending = None

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that a resumed run needs, by name."""
        if self._means is None:
            return {}
        sums = torch.zeros_like(self._means) if self._sums is None else self._sums
        return {_MEANS: self._means, _SUMS: sums, _EPOCH: torch.tensor(self._epoch)}

    def restore(self, tensors: Mapping[str, Tensor], world: World) -> None:
        """Restore the tensors that ``tensors`` returned."""
        if _MEANS not in tensors:
            return
        self._means = tensors[_MEANS].to(world.device)
        self._sums = tensors[_SUMS].to(world.device)
        self._epoch, self._pending = int(tensors[_EPOCH]), None
