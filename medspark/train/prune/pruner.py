"""Prune a network while it trains, and keep a pruned one pruned.

A pruning has two parts. Until the cut, ``rsr`` and ``lasso`` shrink the weights, ``rsr`` and
``noise`` learn the scales of their noise, and ``hydra`` learns its scores. The cut chooses the
masks; ``magnitude`` cuts before the first step. From then on the kept weights are fine-tuned and
all others are zero after every step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from medspark.errors import UsageError
from medspark.models.kernels.trained_form import Copied, TrainedForm
from medspark.models.masks import (
    apply_masks,
    cut_layers,
    layer_scale,
    magnitude_masks,
    nonzero_masks,
    prunable,
)
from medspark.models.noisy import NOISE, add_noise
from medspark.train.prune.config import PruneConfig
from medspark.train.prune.proximal import even_penalty, soft_threshold_
from medspark.train.prune.scores import SCORE, add_scores, refresh, score_masks

__all__ = ["Pruner"]

_CUT, _MASK = "prune/cut", "prune/mask/"


class Pruner:
    """The pruning of one training. The engine calls it around every update of the weights."""

    def __init__(self, config: PruneConfig | None, *, pruned: bool) -> None:
        """``pruned`` states that zeros in the first weights stay; None prunes nothing more."""
        self._config = config
        self._pruned = pruned
        self._model: nn.Module = nn.Identity()
        self._weights: dict[str, nn.Parameter] = {}
        self._masks: dict[str, Tensor] = {}
        self._scales: dict[str, float] = {}  # of the first weights: the lasso's unit in each layer
        self._cut_at, self._penalty = 0, 0.0
        self._shrunk: list[str] = []  # the layers that the lasso shrinks
        self.cut = False

    def attach(self, form: TrainedForm, rates: Sequence[float]) -> TrainedForm:
        """Return ``form`` with the layers that the method needs in its ``trained`` network.

        ``rates`` are the learning rates of all updates. Raises UsageError for a layer that the
        method cannot handle.
        """
        config = self._config
        if config is not None and (config.noisy or config.method == "hydra"):
            form = _with_layers(form, config)
        self._model, self._weights = form.trained, prunable(form.trained)
        self._scales = {name: float(layer_scale(w)) for name, w in self._weights.items()}
        if self._pruned:
            self._masks = nonzero_masks(self._weights)
        if config is None or config.method == "magnitude":
            self._choose()
            return form
        # The last update comes after the cut, so that every training ends with a pruned network.
        self._cut_at = min(math.ceil(config.cut_after * len(rates)), len(rates) - 1)
        if config.method in ("rsr", "lasso"):
            self._shrunk = cut_layers(self._weights, config.sparsity)
            weights, before = [self._weights[n] for n in self._shrunk], rates[: self._cut_at]
            every = sum(weight.numel() for weight in self._weights.values())
            share = config.sparsity * every / max(1, sum(weight.numel() for weight in weights))
            self._penalty = (
                even_penalty(weights, share, before) if config.lasso is None else config.lasso
            )
        if self._cut_at == 0:
            self._choose()
        return form

    @property
    def prunes(self) -> bool:
        """Whether zeros among the weights have to stay."""
        return self._config is not None or self._pruned

    def hold_back(self) -> None:
        """Drop the gradients that this part of the pruning does not follow.

        Those of pruned weights would count in the norm at which gradients are clipped. Before a
        batch norm they are huge where a channel has lost all its weights: its variance is zero.
        Under DDP every parameter takes part in the backward pass, so this comes after it.
        """
        for name, mask in self._masks.items():
            gradient = self._weights[name].grad
            if gradient is not None:
                gradient.masked_fill_(~mask, 0.0)
        if self._config is None or self._config.method != "hydra":
            return
        for name, parameter in self._model.named_parameters():
            if name.endswith(f".{SCORE}") == self.cut:
                parameter.grad = None

    def after(self, update: int, rate: float) -> None:
        """Shrink, choose or mask after ``update``, which was made at learning rate ``rate``."""
        config = self._config
        if config is not None and not self.cut:
            if self._penalty > 0:
                for name in self._shrunk:
                    shift = rate * self._penalty * self._scales[name]
                    soft_threshold_(self._weights[name], shift)
            if config.method == "hydra":
                refresh(self._model, config.sparsity)
            if update + 1 >= self._cut_at:
                self._choose()
        apply_masks(self._weights, self._masks)

    def apply(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the pruned ones of ``tensors``, by the names of the parameters, to zero."""
        learning = not self.cut and self._config is not None and self._config.method == "hydra"
        apply_masks(tensors, score_masks(self._model) if learning else self._masks)

    def noise(self) -> dict[str, Tensor]:
        """Return the scales of the noise by the names of the parameters; none without noise."""
        return {n: p.detach() for n, p in self._model.named_parameters() if n.endswith(f".{NOISE}")}

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that a resumed run needs, by name."""
        if self._config is None:
            return {}  # the first weights have the same zeros again
        masks = {f"{_MASK}{name}": mask for name, mask in self._masks.items()}
        return masks | {_CUT: torch.tensor(self.cut)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the tensors that ``tensors`` returned."""
        if self._config is None:
            return
        self.cut = bool(tensors[_CUT])
        self._masks = {
            name: tensors[f"{_MASK}{name}"].to(weight.device)
            for name, weight in self._weights.items()
            if f"{_MASK}{name}" in tensors
        }

    def _choose(self) -> None:
        """Choose the masks. What is pruned already stays so."""
        self.cut, before, config = True, self._masks, self._config
        if config is not None:
            hydra = config.method == "hydra"
            chosen = (
                score_masks(self._model)
                if hydra
                else magnitude_masks(self._weights, config.sparsity)
            )
            self._masks = {n: mask & before.get(n, mask) for n, mask in chosen.items()}
        apply_masks(self._weights, self._masks)


def _with_layers(form: TrainedForm, config: PruneConfig) -> TrainedForm:
    form = Copied.of(form)
    try:
        if config.method == "hydra":
            add_scores(form.trained, config.sparsity)
        else:
            add_noise(form.trained, config.noise)
    except TypeError as error:
        raise UsageError(f"method: {config.method} cannot prune this network: {error}.") from error
    return form
