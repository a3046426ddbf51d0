"""CutMix mixes images and labels alike, and the same way on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given as given_any
from hypothesis import settings
from hypothesis import strategies as st

from medspark.attacks.losses import cross_entropy
from medspark.data.batch import Batch
from medspark.data.config import AugmentConfig, DataConfig
from medspark.data.cutmix import patches_of
from medspark.data.source import open_source
from medspark.train.objective import BinaryCrossEntropy, CrossEntropy, hard_labels

WriteShards = Callable[..., Path]


def read(
    folder: Path,
    *,
    world: int = 1,
    epoch: int = 0,
    start: int = 0,
    cutmix: float = 1.0,
    seed: int = 3,
    batch: int = 12,
) -> list[list[Batch]]:
    """Return the batches of every rank."""
    source = open_source(folder, DataConfig(augment=AugmentConfig(flip=0)))
    readers = [
        source.training(global_batch=batch, seed=seed, rank=rank, world=world, cutmix=cutmix)
        for rank in range(world)
    ]
    return [list(reader.batches(epoch, start=start)) for reader in readers]


def joined(ranks: list[list[Batch]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the global batches: images and labels."""
    return [
        (torch.cat([b.images.int() for b in here]), torch.cat([b.labels for b in here]))
        for here in zip(*ranks, strict=True)
    ]


@pytest.mark.parametrize("world", [2, 3, 8, 13])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(world: int, write_shards: WriteShards):
    folder = write_shards()

    alone, together = joined(read(folder)), joined(read(folder, world=world))

    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


def test_a_resumed_epoch_reads_what_the_unbroken_one_does(write_shards: WriteShards):
    folder = write_shards()

    whole, rest = joined(read(folder)), joined(read(folder, start=2))

    assert len(rest) == 3
    for one, other in zip(whole[2:], rest, strict=True):
        assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


def test_every_seed_epoch_and_step_has_patches_of_its_own(write_shards: WriteShards):
    folder = write_shards()
    ways = [read(folder), read(folder, epoch=1), read(folder, seed=4)]

    own = [batch.labels.amax((1, 2)) for (batches,) in ways for batch in batches]

    assert len({tuple(shares.tolist()) for shares in own}) == len(own)


@pytest.mark.parametrize("bits", [8, 16])
def test_the_share_of_a_label_is_the_share_of_the_pixels(bits: int, write_shards: WriteShards):
    (batches,) = read(write_shards(side=16, bits=bits))
    mixed = 0

    for batch in batches:
        for image, label, row in zip(batch.images.int(), batch.labels, batch.rows, strict=True):
            pixels = image.flatten()[1:]  # the first one is 255 in every image
            own = pixels == 7 * int(row) % 251
            others = set(pixels[~own].tolist())
            assert len(others) <= 1
            share = [0.0, 0.0]
            share[int(row) % 2] += float(own.float().mean())
            if others:
                mixed += 1
                (partner,) = (r for r in range(50) if 7 * r % 251 in others)
                assert partner in batch.rows
                share[partner % 2] += float((~own).float().mean())
            assert label.shape == (1, 2)
            torch.testing.assert_close(label[0], torch.tensor(share), rtol=0, atol=2 / 256)

    assert mixed > 25


def test_findings_are_mixed_as_the_pixels_are(write_shards: WriteShards):
    (batches,) = read(write_shards(side=16, findings=3))

    for batch in batches:
        for image, label, row in zip(batch.images.int(), batch.labels, batch.rows, strict=True):
            pixels = image.flatten()[1:]
            own = float((pixels == 7 * int(row) % 251).float().mean())
            others = set(pixels.tolist()) - {7 * int(row) % 251}
            partner = next((r for r in range(50) if 7 * r % 251 in others), int(row))
            known = [torch.tensor([(r >> k) & 1 for k in range(3)]) for r in (row, partner)]
            expected = own * known[0] + (1 - own) * known[1]
            torch.testing.assert_close(label, expected, rtol=0, atol=2 / 256)


@settings(max_examples=50)
@given_any(
    st.integers(1, 40), st.integers(1, 20), st.integers(1, 20), st.floats(0.05, 20),
    st.integers(0, 2**63),
)  # fmt: skip
def test_each_image_gives_one_patch_and_gets_one_which_is_a_rectangle(
    size: int, height: int, width: int, alpha: float, key: int
):
    patches = patches_of(size, (height, width), alpha=alpha, key=key)

    assert sorted(patches.partners) == list(range(size))
    assert patches.inside.shape == (size, height, width)
    for inside in patches.inside:
        rows, columns = inside.any(1), inside.any(0)
        assert np.array_equal(inside, rows[:, None] & columns[None])
        for line in (rows, columns):
            assert np.abs(np.diff(line.astype(int))).sum() <= 2
    assert np.allclose(patches.shares, 1 - patches.inside.mean((1, 2)))


def test_alpha_decides_how_evenly_the_areas_are_spread():
    shares = [patches_of(4000, (32, 32), alpha=a, key=5).shares for a in (0.1, 1.0, 50.0)]

    # Patches that reach over the edge are smaller than drawn, so images keep more than half.
    assert all(0.5 < found.mean() < 0.85 for found in shares)
    assert shares[0].std() > shares[1].std() > 1.5 * shares[2].std()


def test_without_it_the_batches_are_plain(write_shards: WriteShards):
    (batches,) = read(write_shards(), cutmix=0.0)

    assert all(batch.labels.ndim == 1 for batch in batches)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 1.0])])
def test_the_loss_of_a_mixed_label_is_the_mixed_loss_of_both(
    smoothing: float, weights: torch.Tensor | None
):
    torch.manual_seed(0)
    logits, objective = torch.randn(6, 3), CrossEntropy(weights, smoothing)
    first, second = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 2, 1, 1, 0, 2])
    known = F.one_hot(torch.stack([first, second]), 3).float()
    mixed = (0.3 * known[0] + 0.7 * known[1])[:, None]

    expected = 0.3 * objective(logits, first) + 0.7 * objective(logits, second)
    torch.testing.assert_close(objective(logits, mixed), expected)
    attacked = 0.3 * cross_entropy(logits, first) + 0.7 * cross_entropy(logits, second)
    torch.testing.assert_close(cross_entropy(logits, mixed), attacked)
    assert hard_labels(mixed).tolist() == second.tolist()


def test_the_loss_of_mixed_findings_is_the_mixed_loss_of_both():
    torch.manual_seed(0)
    logits, objective = torch.randn(6, 3), BinaryCrossEntropy(torch.tensor([1.0, 3.0, 0.5]))
    first, second = torch.randint(0, 2, (2, 6, 3)).float()

    mixed = objective(logits, 0.3 * first + 0.7 * second)

    expected = 0.3 * objective(logits, first) + 0.7 * objective(logits, second)
    torch.testing.assert_close(mixed, expected)
    assert torch.equal(hard_labels(0.3 * first + 0.7 * second), second)
