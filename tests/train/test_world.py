"""A process among others, or by itself although it was started as one of several could be."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from medspark.train.timeline import Timeline, peak_memory_mb
from medspark.train.world import join


def test_a_single_process_stays_out_of_a_process_group_if_told_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"MASTER_ADDR": "localhost", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)

    with join(alone=True) as world:
        assert (world.rank, world.size, world.distributed) == (0, 1, False)
        assert not dist.is_initialized()


def test_a_moment_is_kept_when_it_comes_first() -> None:
    timeline = Timeline()
    timeline.note("stepped")
    first = timeline.moments["stepped"]

    timeline.note("stepped")

    assert timeline.moments == {"stepped": first}
    assert 1 < peak_memory_mb() < 1e6
