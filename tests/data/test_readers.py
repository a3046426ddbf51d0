"""Both readers, on any rank: every row once, equal steps, the same samples."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from medspark.data.batch import Batch, pinned, to_unit
from medspark.data.config import AugmentConfig, DataConfig
from medspark.data.native import MappedSplit
from medspark.data.source import open_source
from medspark.shards.manifest import read_manifest

WriteShards = Callable[..., Path]
READERS = ["native", "petastorm"]
PLAIN = AugmentConfig(flip=0)


def read(
    folder: Path,
    reader: str,
    *,
    world: int = 1,
    batch: int = 12,
    epoch: int = 0,
    start: int = 0,
    augment: AugmentConfig = PLAIN,
) -> list[list[Batch]]:
    """Return the batches of every rank."""
    source = open_source(folder, DataConfig(reader=reader, augment=augment, window=16))
    readers = [
        source.training(global_batch=batch, seed=3, rank=rank, world=world) for rank in range(world)
    ]
    return [list(r.batches(epoch, start=start)) for r in readers]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("batch", [5, 12, 64])
def test_every_row_is_read_exactly_once_an_epoch(
    reader: str, world: int, batch: int, write_shards: WriteShards
):
    ranks = read(write_shards(), reader, world=world, batch=batch)

    rows = np.concatenate([b.rows for batches in ranks for b in batches])
    assert sorted(rows) == list(range(50))


@pytest.mark.parametrize("reader", READERS)
def test_every_rank_takes_the_planned_steps_and_weighs_its_part_of_each(
    reader: str, write_shards: WriteShards
):
    ranks = read(write_shards(rows=51), reader, world=3, start=1)

    assert [[b.step for b in batches] for batches in ranks] == [[1, 2, 3, 4]] * 3
    assert {batch.global_size for batch in ranks[0]} == {10, 11}
    for here in zip(*ranks, strict=True):
        assert sum(len(b.labels) for b in here) == here[0].global_size
        for batch in here:
            assert batch.weight == pytest.approx(3 * len(batch.labels) / batch.global_size)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("bits", [8, 16])
def test_images_and_labels_are_those_of_their_rows(
    reader: str, bits: int, write_shards: WriteShards
):
    (batches,) = read(write_shards(bits=bits), reader)

    for batch in batches:
        pixels = batch.images.to(torch.int64)
        assert batch.images.shape[1:] == (1, 6, 6)
        assert torch.equal(pixels[:, 0, 3, 3], torch.from_numpy(7 * batch.rows % 251))
        assert np.array_equal(batch.labels.numpy(), batch.rows % 2)


@pytest.mark.parametrize("device", ["pretended", "cuda"], indirect=True)
@pytest.mark.parametrize("bits", [8, 16])
def test_stored_integers_of_either_depth_become_the_same_floats_on_any_device(
    bits: int, device: torch.device
):
    largest = 2**bits - 1
    images = np.arange(0, largest + 1, largest // 5).astype(f"<u{bits // 8}").reshape(1, 1, 2, 3)

    floats = to_unit(torch.from_numpy(images), device)

    assert floats.device == device
    torch.testing.assert_close(floats.cpu().flatten(), torch.linspace(0, 1, 6))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_a_batch_for_a_gpu_lies_in_pinned_memory_as_it_lay_before(
    device: torch.device, write_shards: WriteShards
):
    (batches,) = read(write_shards(), "native")
    given = batches[0]

    moved = pinned(given)

    assert moved.images.is_pinned()
    assert moved.labels.is_pinned()
    assert moved.images.stride() == given.images.stride()
    assert torch.equal(moved.images, given.images)


@pytest.mark.parametrize("reader", READERS)
def test_masks_are_delivered_as_findings(reader: str, write_shards: WriteShards):
    (batches,) = read(write_shards(findings=3), reader)

    for batch in batches:
        bits = batch.rows[:, None] % 8 >> np.arange(3) & 1
        assert batch.labels.dtype == torch.float32
        assert np.array_equal(batch.labels.numpy(), bits)


@pytest.mark.parametrize("reader", READERS)
def test_the_same_seed_reads_in_the_same_order_and_another_epoch_in_another(
    reader: str, write_shards: WriteShards
):
    folder = write_shards()

    first, again, other = (
        np.concatenate([b.rows for b in read(folder, reader, epoch=epoch)[0]]).tolist()
        for epoch in (0, 0, 1)
    )

    assert first == again
    assert first != other


@pytest.mark.parametrize("reader", READERS)
def test_a_resumed_epoch_goes_on_where_it_stopped(reader: str, write_shards: WriteShards):
    folder = write_shards()
    (whole,) = read(folder, reader)
    (rest,) = read(folder, reader, start=2)

    assert [b.step for b in rest] == [2, 3, 4]
    assert [b.rows.tolist() for b in rest] == [b.rows.tolist() for b in whole[2:]]


def test_the_global_batch_does_not_depend_on_the_number_of_ranks(write_shards: WriteShards):
    folder = write_shards()
    (alone,) = read(folder, "native")
    ranks = read(folder, "native", world=3)

    for step, batch in enumerate(alone):
        together = np.concatenate([batches[step].rows for batches in ranks])
        assert batch.rows.tolist() == together.tolist()


@pytest.mark.petastorm
def test_both_readers_show_a_row_in_the_same_way(write_shards: WriteShards):
    folder = write_shards()
    varied = AugmentConfig(flip=0.5, shift=0.2)
    seen = []
    for reader in READERS:
        (batches,) = read(folder, reader, augment=varied)
        images = torch.cat([b.images for b in batches])
        order = np.argsort(np.concatenate([b.rows for b in batches]))
        seen.append(images[torch.from_numpy(order)])

    assert torch.equal(seen[0], seen[1])


def test_native_images_are_channels_last(write_shards: WriteShards):
    (batches,) = read(write_shards(), "native")

    assert batches[0].images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("reader", READERS)
def test_augmentation_is_drawn_by_the_seed_and_anew_in_every_epoch(
    reader: str, write_shards: WriteShards
):
    folder, mirrored = write_shards(), []
    for seed, epoch in ((3, 0), (3, 0), (3, 1), (4, 0)):
        source = open_source(folder, DataConfig(reader=reader, augment=AugmentConfig(shift=0.3)))
        batches = source.training(global_batch=50, seed=seed, rank=0, world=1).batches(epoch)
        images, rows = zip(*((b.images, b.rows) for b in batches), strict=True)
        mirrored.append(torch.cat(images)[np.argsort(np.concatenate(rows))])

    first, again, later, other = mirrored
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("reader", READERS)
def test_another_seed_reads_in_another_order(reader: str, write_shards: WriteShards):
    source = open_source(write_shards(), DataConfig(reader=reader, window=16))
    orders = [
        [
            b.rows.tolist()
            for b in source.training(global_batch=12, seed=s, rank=0, world=1).batches(0)
        ]
        for s in (1, 1, 2)
    ]

    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("reader", READERS)
def test_without_augmentation_a_row_is_read_as_it_is_stored(reader: str, write_shards: WriteShards):
    (batches,) = read(write_shards(), reader)

    for batch in batches:
        first, *others = batch.images.flatten(1).unbind(1)
        assert (first == 255).all()
        for pixel in others:
            assert np.array_equal(pixel.numpy(), 7 * batch.rows % 251)


@pytest.mark.parametrize("findings", [0, 3])
def test_a_subset_of_a_subset_has_the_images_and_labels_of_its_rows_and_reads_no_file(
    findings: int, write_shards: WriteShards
):
    folder = write_shards(findings=findings)
    whole = MappedSplit(folder, read_manifest(folder), "train")
    images, labels = whole.gather(np.array([41, 3]))
    shutil.rmtree(folder)

    part = whole.subset(np.array([3, 17, 41, 9])).subset(np.array([2, 0]))

    assert len(part) == 2
    assert np.array_equal(part.labels, labels)
    assert np.array_equal(part.gather(np.arange(2))[0], images)
    assert len(whole) == 50
