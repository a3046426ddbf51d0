"""Ranks of one host: each update has the sum of its own gradients, and of no other."""

from __future__ import annotations

import mmap
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medspark.train.gradients import one_host
from medspark.train.gradients.one_host import OneHost
from medspark.train.world import World

CPU = torch.device("cpu")
SIZES = (3, 2)
# What one backward pass of a rank multiplies each parameter's sum by; None: not in the pass.
PASS = st.tuples(*(st.none() | st.integers(-9, 9) for _ in SIZES))
# Updates of ranks of passes.
UPDATES = st.integers(2, 4).flatmap(
    lambda ranks: st.lists(
        st.lists(st.lists(PASS, max_size=2), min_size=ranks, max_size=ranks), max_size=5
    )
)


def build_parameters() -> nn.ParameterList:
    return nn.ParameterList(torch.zeros(size) for size in SIZES)


def take_updates(own: OneHost, updates: list[list[tuple[int | None, ...]]]) -> list[list[float]]:
    """Return the gradients of every update, one number a parameter."""
    parameters, found = list(own.model.parameters()), []
    for passes in updates:
        own.begin()
        for factors in passes:
            terms = [p.sum() * f for p, f in zip(parameters, factors, strict=True) if f is not None]
            if terms:
                torch.stack(terms).sum().backward()
        own.finish()
        found.append([float(p.grad.unique()) for p in parameters])
        for parameter in parameters:
            parameter.grad.mul_(7)  # as clipping does: nobody else may see it
            parameter.grad = None
    return found


@given(UPDATES)
@settings(max_examples=30)
def test_every_rank_has_the_sum_of_this_updates_gradients(
    updates: list[list[list[tuple[int | None, ...]]]],
) -> None:
    size = len(updates[0]) if updates else 2
    memory = mmap.mmap(-1, 2 * size * sum(SIZES) * 4)
    together = threading.Barrier(size)
    with (
        mock.patch.object(one_host, "_LARGE", SIZES[0]),
        mock.patch.object(one_host.dist, "broadcast"),
        mock.patch.object(one_host.dist, "all_reduce", side_effect=lambda _: together.wait(60)),
        ThreadPoolExecutor(size) as threads,
    ):
        ranks = [
            OneHost(build_parameters(), count=1, world=World(rank, 0, size, CPU), memory=memory)
            for rank in range(size)
        ]
        parts = [[update[rank] for update in updates] for rank in range(size)]
        found = list(threads.map(take_updates, ranks, parts))

    for rank in range(size):
        assert found[rank] == [
            [
                sum(factors[number] or 0 for passes in update for factors in passes)
                for number in range(len(SIZES))
            ]
            for update in updates
        ]
