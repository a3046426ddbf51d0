"""The exact sum does not depend on the ranks, and micro-batches do not change the gradient."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny_network import engine_for

from medspark.data.batch import Batch
from medspark.errors import UsageError
from medspark.models.classifier import Classifier
from medspark.train.engine import Engine
from medspark.train.gradients.virtual_shards import VirtualShards, tree_sum
from medspark.train.learner import Sample
from medspark.train.world import World

ALONE = World(0, 0, 1, torch.device("cpu"))


def engine_of(model: Classifier, *, steps: int = 3, **chosen: object) -> Engine:
    """Return what trains ``model`` alone, in float32."""
    return engine_for(model, steps=steps, batch_size=10, **chosen)


def batch_of(given: Sample) -> Batch:
    """Return ``given`` as the reader delivers it."""
    images = (given.images * 255).to(torch.uint8)
    return Batch(images, given.labels, np.arange(10), 1.0, 10, 0, 0)


def trained(model: Classifier, given: Sample, *, steps: int = 3, **chosen: object) -> list:
    """Return the losses of a few steps and the weights after them."""
    engine, batch = engine_of(model, steps=steps, **chosen), batch_of(given)
    losses = [float(engine.step(batch, step).figures[0]) for step in range(steps)]
    return [torch.tensor(losses), *engine.model.state_dict().values()]


@pytest.mark.parametrize("chosen", [{"accumulate": 3}, {"elastic": "exact"}], ids=str)
def test_a_batch_in_pieces_trains_as_the_whole_batch(
    chosen: dict[str, object], tiny: Callable[..., Classifier], sample: Callable[..., Sample]
):
    model, other = tiny(), tiny()
    for network in (model, other):
        network.batch_norm_frozen = True

    whole = trained(model, sample(), mode="fused_noise")
    pieces = trained(other, sample(), mode="fused_noise", **chosen)

    pairs = zip(whole, pieces, strict=True)
    assert all(torch.allclose(a.float(), b.float(), atol=2e-4) for a, b in pairs)


@pytest.mark.parametrize(
    "chosen", [{}, {"accumulate": 3}, {"elastic": "exact"}, {"gradalign": 0.2}], ids=str
)
def test_gradients_lie_in_memory_like_their_weights(
    chosen: dict[str, object], tiny: Callable[..., Classifier], sample: Callable[..., Sample]
):
    # Torch's fused AdamW takes the elements of any other gradient in the wrong order, silently.
    engine, seen = engine_of(tiny(), **chosen), []

    def lies(tensor: torch.Tensor) -> list[tuple[int, int]]:
        return [pair for pair in zip(tensor.shape, tensor.stride(), strict=True) if pair[0] > 1]

    def note(*_: object) -> None:
        seen.extend((lies(p), lies(p.grad)) for p in engine.model.parameters())

    engine.optimiser.register_step_pre_hook(note)
    engine.step(batch_of(sample()), 0)

    assert seen
    assert all(weight == gradient for weight, gradient in seen)


def test_more_virtual_shards_than_images_are_no_harm(
    tiny: Callable[..., Classifier], sample: Callable[..., Sample]
):
    losses, *_ = trained(tiny(), sample(), elastic="exact", virtual_shards=16, batch_norm="frozen")

    assert torch.isfinite(losses).all()


@pytest.mark.parametrize(("count", "size"), [(3, 1), (4, 3), (2, 4)])
def test_shards_that_ranks_cannot_share_out_are_refused(
    count: int, size: int, tiny: Callable[..., Classifier]
):
    with pytest.raises(UsageError, match=r"train\.virtual_shards"):
        VirtualShards(tiny(), count=count, world=World(0, 0, size, torch.device("cpu")))


def test_branches_of_the_tree_add_up_to_the_tree():
    values = list(torch.rand(8, 1000, generator=torch.Generator().manual_seed(0)))

    whole = tree_sum(values)

    for ranks in (2, 4, 8):
        branches = [tree_sum(values[i : i + 8 // ranks]) for i in range(0, 8, 8 // ranks)]
        assert torch.equal(tree_sum(branches), whole)
