"""Laws of the plan: rows exactly once, equal steps, batches independent of the world size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.shards import plan
from medspark.shards.plan import EpochPlan, permute, share

rows = st.integers(1, 400)
batches = st.integers(1, 64)
worlds = st.integers(1, 9)
seeds = st.integers(0, 2**32)
epochs = st.integers(0, 50)


@given(rows, batches, worlds, seeds, epochs)
def test_every_row_is_read_exactly_once_an_epoch(
    n: int, batch: int, world: int, seed: int, epoch: int
):
    plan = EpochPlan(n, batch, seed, epoch)

    read = [plan.rank_batch(s, r, world) for s in range(plan.steps) for r in range(world)]

    assert sorted(np.concatenate(read)) == list(range(n))


@given(rows, batches, worlds, seeds)
def test_the_global_batch_does_not_depend_on_the_world_size(
    n: int, batch: int, world: int, seed: int
):
    plan = EpochPlan(n, batch, seed)

    for step in range(plan.steps):
        slices = [plan.rank_batch(step, rank, world) for rank in range(world)]
        assert np.array_equal(np.concatenate(slices), plan.batch(step))


@given(rows, st.integers(1, 5), worlds, seeds, st.data())
def test_batches_that_are_planned_many_at_once_are_the_ones_planned_alone(
    n: int, batch: int, world: int, seed: int, data: st.DataObject
):
    plan = EpochPlan(n, batch, seed)
    start = data.draw(st.integers(0, plan.steps))
    rank = data.draw(st.integers(0, world - 1))

    together = list(plan.rank_batches(rank, world, start=start))

    alone = [plan.rank_batch(step, rank, world) for step in range(start, plan.steps)]
    assert len(together) == len(alone)
    assert all(map(np.array_equal, together, alone))


@given(rows, batches, worlds)
def test_ranks_and_steps_differ_by_at_most_one_row(n: int, batch: int, world: int):
    plan = EpochPlan(n, batch, 0)
    sizes = [plan.batch_size(step) for step in range(plan.steps)]

    assert max(sizes) <= batch
    assert max(sizes) - min(sizes) <= 1
    for step in range(plan.steps):
        slices = [len(plan.rank_batch(step, rank, world)) for rank in range(world)]
        assert max(slices) - min(slices) <= 1


@given(rows, batches, worlds)
def test_weighted_rank_means_average_to_the_mean_of_the_global_batch(
    n: int, batch: int, world: int
):
    plan = EpochPlan(n, batch, 0)
    losses = np.random.default_rng(n).random(n)

    for step in range(plan.steps):
        slices = [plan.rank_batch(step, rank, world) for rank in range(world)]
        parts = [
            plan.weight(step, rank, world) * losses[mine].mean() if len(mine) else 0.0
            for rank, mine in enumerate(slices)
        ]
        assert np.mean(parts) == pytest.approx(losses[plan.batch(step)].mean())


@given(rows, seeds, epochs)
def test_a_resumed_epoch_goes_on_with_the_rows_that_were_not_read(n: int, seed: int, epoch: int):
    plan, world_before, world_after = EpochPlan(n, 16, seed, epoch), 3, 2
    half = plan.steps // 2

    before = [plan.rank_batch(s, r, world_before) for s in range(half) for r in range(world_before)]
    after = [
        plan.rank_batch(s, r, world_after)
        for s in range(half, plan.steps)
        for r in range(world_after)
    ]

    assert sorted(np.concatenate(before + after)) == list(range(n))


@given(st.integers(1, 3000), seeds)
def test_a_shuffle_is_a_permutation(total: int, key: int):
    assert sorted(permute(np.arange(total), total, key)) == list(range(total))


@given(st.integers(1, 3000), seeds)
def test_a_stored_table_shuffles_as_the_network_does(total: int, key: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_TABLED", 0)
        direct = permute(np.arange(total), total, key)

    assert np.array_equal(permute(np.arange(total), total, key), direct)


def test_epochs_and_seeds_shuffle_differently():
    orders = {
        tuple(EpochPlan(100, 100, seed, epoch).batch(0)) for seed in (0, 1) for epoch in (0, 1)
    }

    assert len(orders) == 4


def test_a_shuffle_leaves_no_trace_of_the_old_order():
    n = 20_000
    order = permute(np.arange(n), n, 11)

    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.03
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert (np.diff(order) == 1).sum() < 12


def test_a_batch_of_a_billion_rows_costs_no_memory():
    batch = EpochPlan(10**9, 64, seed=1).batch(12_345)

    assert len(set(batch)) == 64
    assert batch.max() < 10**9


def test_without_shuffle_rows_come_in_order():
    plan = EpochPlan(10, 4, seed=0, shuffle=False)

    assert np.array_equal(np.concatenate([plan.batch(s) for s in range(plan.steps)]), np.arange(10))


@given(st.integers(0, 1000), st.integers(1, 50))
def test_shares_are_contiguous_and_cover_everything(total: int, parts: int):
    bounds = [share(total, parts, part) for part in range(parts)]

    assert bounds[0][0] == 0
    assert bounds[-1][1] == total
    assert all(left[1] == right[0] for left, right in itertools.pairwise(bounds))


def test_an_epoch_is_shuffled_as_by_the_version_before():
    assert permute(np.arange(10), 10, 11).tolist() == [6, 2, 9, 3, 0, 7, 1, 5, 4, 8]
    assert EpochPlan(10, 5, seed=3, epoch=2).batch(1).tolist() == [6, 5, 9, 4, 1]


@pytest.mark.parametrize(("rows", "batch"), [(0, 1), (1, 0), (-1, 4)])
def test_a_plan_of_no_rows_or_of_empty_batches_is_refused(rows: int, batch: int):
    with pytest.raises(ValueError, match="an epoch needs rows and a batch"):
        EpochPlan(rows, batch, seed=0)
