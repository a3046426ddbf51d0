"""Train several clients of a network of linear layers at once, a step of all in one pass.

A step of such a network takes microseconds, most of them the cost of torch's operations whatever
their size. So each linear layer of a copy of the network holds the weights of L clients and
multiplies them by one batched product. Layers without parameters take the images of all clients as
one batch. This is vectorisation over clients as in FedJAX (Ro et al. 2021). Convolutions would gain
nothing: there the products are most of the time.

A client's bits may depend on its place among the L and on L, because a product rounds by the
alignment of its operands. They do not depend on the other clients' images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medspark.data.augment import augment
from medspark.data.batch import Integers, to_unit
from medspark.data.config import AugmentConfig
from medspark.data.native import MappedSplit
from medspark.federate.client import Answer, Memory, Task, optimiser_of, set_rate
from medspark.federate.config import FederationConfig
from medspark.federate.local import LocalConfig
from medspark.shards.plan import EpochPlan

__all__ = ["Vectorised", "bundles", "vectorises"]

# Clients that train at once: with more, a step costs little less for each, and tasks share worse.
_LANES = 8
# A network with more weights waits for memory, not for torch.
_MOST_WEIGHTS = 1 << 18
# Logits may differ from those of the plain network by rounding only.
_TOLERANCE = 1e-3


class LaneLinear(nn.Module):
    """A linear layer with weights (L, out, in) and biases (L, out) for L clients."""

    def __init__(self, linear: nn.Linear, lanes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(_repeated(linear.weight, lanes))
        self.bias = None if linear.bias is None else nn.Parameter(_repeated(linear.bias, lanes))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (L * B, ..., out) of inputs (L * B, ..., in), of client after client."""
        lanes, out, size = self.weight.shape
        # In this order the gradient of the weights is a product of rows, a fifth of the time.
        columns = inputs.reshape(lanes, -1, size).transpose(1, 2)
        if self.bias is None:
            found = torch.bmm(self.weight, columns)
        else:
            found = torch.baddbmm(self.bias[:, :, None], self.weight, columns)
        return found.transpose(1, 2).reshape(*inputs.shape[:-1], out)


@dataclass(frozen=True)
class Vectorised:
    """A copy of a network that holds the weights of ``lanes`` clients."""

    model: nn.Module
    lanes: int

    @classmethod
    def of(cls, model: nn.Module, lanes: int) -> Self:
        """Return a copy of ``model``, every lane with its weights."""
        copied = copy.deepcopy(model)
        for name, layer in list(copied.named_modules()):
            if type(layer) is nn.Linear:
                copied.set_submodule(name, LaneLinear(layer, lanes))
        return cls(copied, lanes)

    def train(
        self,
        split: MappedSplit,
        rows: Sequence[Integers],
        task: Task,
        config: LocalConfig,
        *,
        augmentation: AugmentConfig | None = None,
    ) -> list[Answer]:
        """Return the answers to ``task`` of the clients that hold the ``rows`` of ``split``.

        All hold equally many. Up to rounding the answers are those of ``train_client``.
        """
        layers = [layer for layer in self.model.modules() if isinstance(layer, LaneLinear)]
        tensors = [each for layer in layers for each in layer.parameters()]
        self._unpack(tensors, task)
        self.model.train()
        optimiser = optimiser_of(
            [layer.weight for layer in layers],
            [layer.bias for layer in layers if layer.bias is not None],
            config,
        )
        images, size, steps = len(rows[0]), config.batch_size, 0
        first = sum(config.epochs_in(earlier) for earlier in range(task.round))
        passes = config.epochs_in(task.round)
        in_round = passes * EpochPlan(images, size, task.seed).steps
        losses = torch.zeros(self.lanes)
        for epoch in range(first, first + passes):
            losses = torch.zeros(self.lanes)
            plan = EpochPlan(images, size, task.seed, epoch)
            for numbers in plan.rank_batches(0, 1):
                place = task.round * in_round + steps, task.rounds * in_round
                batch = self._batch(split, rows, numbers, task, augmentation, epoch)
                losses += len(numbers) * self._gradients(*batch)
                if config.clip_grad:
                    _clip(tensors, config.clip_grad)
                set_rate(optimiser, config.rate_at(*place, round=task.round))
                optimiser.step()
                for tensor in tensors:
                    tensor.grad = None
                steps += 1
        weights = torch.cat([tensor.detach().flatten(1) for tensor in tensors], dim=1).numpy()
        return [
            Answer(mine, images, steps, loss / images, Memory())
            for mine, loss in zip(weights, losses.tolist(), strict=True)
        ]

    def _batch(
        self,
        split: MappedSplit,
        rows: Sequence[Integers],
        numbers: Integers,
        task: Task,
        augmentation: AugmentConfig | None,
        epoch: int,
    ) -> tuple[Tensor, Tensor]:
        """Return images (L * B, C, H, W) in [0, 1] and labels of client after client."""
        images, labels = split.gather(np.concatenate([mine[numbers] for mine in rows]))
        if augmentation is not None:
            every = np.tile(numbers, self.lanes)
            images = augment(images, every, config=augmentation, seed=task.seed, epoch=epoch)
        stored = torch.from_numpy(images).permute(0, 3, 1, 2)
        return to_unit(stored, stored.device), torch.from_numpy(labels)

    def _gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """Leave the gradient of each client's mean loss in ``.grad``; return the losses (L,)."""
        logits = self.model(images)
        if labels.ndim == 2:
            target = labels.to(logits.dtype)
            each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        else:
            each = F.cross_entropy(logits, labels, reduction="none")
        losses = each.view(self.lanes, -1).mean(1)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        return losses.detach()

    @torch.no_grad()
    def _unpack(self, tensors: Sequence[Tensor], task: Task) -> None:
        sizes = [tensor[0].numel() for tensor in tensors]
        for tensor, part in zip(
            tensors, torch.split(torch.from_numpy(task.weights), sizes), strict=True
        ):
            tensor.copy_(part.view(tensor.shape[1:]))


def vectorises(
    config: FederationConfig,
    network: Callable[[], nn.Module],
    shape: tuple[int, int, int],
    *,
    weights: int,
) -> bool:
    """Return whether the clients of a federation train at once.

    They do if training is plain: no attack, no adversary, no memory; and if all ``weights`` of the
    ``network``, whose images have ``shape`` (C, H, W), are those of linear layers. A trial shows
    that no other layer mixes images or draws random numbers. The network is made only if all else
    fits.
    """
    plain = config.train.mode == "standard" and config.train.gradalign == 0
    alike = config.calibrate == "none" and config.prox == 0 and config.precision == "fp32"
    honest = config.adversary.name == "none" and config.adversary.honest_edge == 0
    if not (plain and alike and honest) or config.keeps_memory or weights > _MOST_WEIGHTS:
        return False
    model = network()
    linear = {id(p) for m in model.modules() if type(m) is nn.Linear for p in m.parameters()}
    known = all(id(p) in linear and p.requires_grad for p in model.parameters())
    return bool(linear) and known and _agrees(model, shape)


@torch.no_grad()
def _agrees(model: nn.Module, shape: tuple[int, int, int]) -> bool:
    """Return whether two lanes answer as two networks do, in training mode."""
    images = torch.rand(6, *shape, generator=torch.Generator().manual_seed(0))
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.mul_(0.5)
    both = Vectorised.of(model, 2).model
    for parameter in both.parameters():
        parameter[1].mul_(0.5)
    expected = [
        copy.deepcopy(each).train()(part)
        for each, part in zip((model, other), torch.split(images, 3), strict=True)
    ]
    wanted, found = torch.cat(expected), both.train()(images)
    largest = max(1.0, float(wanted.abs().max()))
    return float((found - wanted).abs().max()) <= _TOLERANCE * largest


def bundles(clients: Sequence[int], counts: Integers) -> list[list[int]]:
    """Divide clients into bundles of at most eight that hold equally many images.

    The bundles depend on the clients alone. Those of the same count differ in size by at most one.
    """
    found: list[list[int]] = []
    for count in sorted({int(counts[client]) for client in clients}):
        equal = [client for client in sorted(clients) if counts[client] == count]
        parts = -(-len(equal) // _LANES)
        found += [part.tolist() for part in np.array_split(np.array(equal), parts)]
    return found


def _repeated(tensor: Tensor, lanes: int) -> Tensor:
    return tensor.detach().expand(lanes, *tensor.shape).clone()


def _clip(tensors: Sequence[Tensor], largest: float) -> None:
    """Scale each client's gradient (L, ...) to a norm of at most ``largest``."""
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    squares = [torch.linalg.vector_norm(each.flatten(1), dim=1).square() for each in gradients]
    factors = (largest / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp(max=1.0)
    for each in gradients:
        each.mul_(factors.view(-1, *[1] * (each.ndim - 1)))
