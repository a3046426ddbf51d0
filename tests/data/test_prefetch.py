"""The prefetching thread keeps order, hands errors on, and goes away."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from medspark.data.prefetch import Prefetcher


def test_items_come_in_order():
    with Prefetcher(iter(range(100)), depth=3) as ready:
        assert list(ready) == list(range(100))


def test_an_error_is_raised_where_the_item_was_asked_for():
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    with Prefetcher(broken(), depth=3) as ready, pytest.raises(OSError, match="gone"):
        list(ready)


def test_leaving_early_stops_the_thread():
    with Prefetcher(iter(range(10**9)), depth=2) as ready:
        next(iter(ready))

    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_no_more_than_depth_items_are_prepared_ahead():
    made = []

    def items() -> Iterator[int]:
        for i in range(10):
            made.append(i)
            yield i

    with Prefetcher(items(), depth=2):
        time.sleep(0.2)
        # Two items wait in the queue, and the thread holds one.
        assert len(made) == 3


def test_what_is_waited_for_is_measured():
    def slow() -> Iterator[int]:
        time.sleep(0.05)
        yield 1

    with Prefetcher(slow(), depth=1) as ready:
        list(ready)

    assert ready.waited >= 0.04
