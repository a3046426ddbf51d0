"""A process in a group, or alone although the environment describes a group."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from medspark.errors import UsageError
from medspark.train.timeline import Timeline, peak_memory_mb
from medspark.train.world import World, _read, join


def test_a_single_process_stays_out_of_a_process_group_if_told_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"MASTER_ADDR": "localhost", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)

    with join(alone=True) as world:
        assert (world.rank, world.size, world.distributed) == (0, 1, False)
        assert not dist.is_initialized()


@pytest.fixture
def together(tmp_path: Path) -> Iterator[World]:
    """A world of one process with a process group, but without a socket."""
    with join(store=dist.FileStore(str(tmp_path / "store"), 1)) as world:
        yield world


@given(
    st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.booleans()
    | arrays(st.sampled_from(["<f4", "<f8", "<i8", "?", "<U5"]), array_shapes(min_side=0))
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_gathered_is_what_was_said(together: World, value: Any) -> None:
    assert together.distributed

    (found,) = together.gather(value)

    assert type(found) is type(value)
    np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize("value", [object(), {"a": 1}, [object()]])
def test_nothing_is_gathered_that_would_have_to_be_unpickled(together: World, value: Any) -> None:
    with pytest.raises(ValueError, match="cannot be saved"):
        together.gather(value)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make torch report that this machine has a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):  # puts back what it finds
        yield


@pytest.mark.usefixtures("one_gpu")
def test_on_a_gpu_float32_is_float32_and_the_same_twice() -> None:
    with join(alone=True) as world:
        assert world.device == torch.device("cuda", 0)

    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize(("name", "value"), [("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "1")])
def test_processes_that_would_have_to_share_a_gpu_are_refused(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(UsageError, match=r"2 processes cannot share 1 GPU"), join(alone=True):
        pass


def test_a_moment_is_kept_when_it_comes_first() -> None:
    timeline = Timeline()
    timeline.note("stepped")
    first = timeline.moments["stepped"]

    timeline.note("stepped")

    assert timeline.moments == {"stepped": first}
    assert 1 < peak_memory_mb() < 1e6


def test_what_reaches_a_rank_is_never_unpickled() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}]), allow_pickle=True)

    with pytest.raises(ValueError, match="allow_pickle"):
        _read(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
