"""A pool of decoders: a slow file delays other callers by one turn at most."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
from pydicom import uid
from pydicom.encaps import encapsulate

from medspark.images import phantom
from medspark.images.decode import decode
from medspark.images.limits import Limits
from medspark.images.pool import Busy, DecoderPool, Turns
from medspark.images.reasons import Reason, Unreadable
from medspark.images.rendering import Rendering

SMALL = Rendering(size=16)
MakeDicom = Callable[..., bytes]


@contextmanager
def pool_of(limits: Limits | None = None, **turns: float) -> Iterator[DecoderPool]:
    pool = DecoderPool(
        rendering=SMALL, limits=limits or Limits(), turns=Turns.model_validate(turns)
    )
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture(scope="module")
def good() -> bytes:
    config = phantom.PhantomConfig(count=1, size=32, syntaxes=("jpeg_ls",))
    return phantom.encode(next(iter(phantom.plan(config))), config)


@pytest.fixture
def slow(dicom: MakeDicom) -> bytes:
    """A file that takes a minute or more: 1,000 frames of run lengths, unpacked by Python."""
    side, frames = 1600, 1000
    runs = b"\x81\0" * (side * side // 128)  # 128 zeros each (PS3.5 G.3)
    frame = (1).to_bytes(4, "little") + (64).to_bytes(4, "little") + bytes(56) + runs
    return dicom(
        np.zeros((side, side), np.uint8), syntax=uid.RLELossless, frames=frames,
        pixel_data=encapsulate([frame] * frames, has_bot=False),
    )  # fmt: skip


def _ask(pool: DecoderPool, data: bytes, answers: list[object]) -> threading.Thread:
    """Decode ``data`` in a turn in a new thread, which adds the result to ``answers``."""

    def work() -> None:
        try:
            with pool.turn() as turn:
                answers.append(len(turn.decode(data)))
        except (Busy, Unreadable) as error:
            answers.append(type(error))

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def _wait_for(found: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not found() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found()


def test_frames_are_those_of_plain_decoding(good: bytes) -> None:
    with pool_of() as pool, pool.turn() as turn:
        (ours,) = turn.decode(good)

    (plain,) = decode(good, rendering=SMALL)
    assert np.array_equal(ours.pixels, plain.pixels)
    assert ours.attributes == plain.attributes


def test_a_decoder_that_dies_costs_one_file_and_is_replaced_within_the_turn(good: bytes) -> None:
    with pool_of(processes=1) as pool, pool.turn() as turn:
        turn.decode(good)
        child = turn._decoder._child
        assert child is not None
        os.kill(child._process.pid, signal.SIGKILL)

        with pytest.raises(Unreadable) as caught:
            turn.decode(good)
        assert caught.value.reason is Reason.DECODER_CRASHED
        assert len(turn.decode(good)) == 1


def test_a_file_that_never_ends_loses_its_turn_to_who_waits(good: bytes, slow: bytes) -> None:
    answers: list[object] = []
    with pool_of(processes=1, turn_seconds=0.2, wait_seconds=120) as pool:
        first = _ask(pool, slow, answers)
        _wait_for(lambda: pool._running)
        _ask(pool, good, answers).join()
        first.join()

    assert sorted(answers, key=str) == [1, Busy]


def test_a_turn_goes_on_while_nobody_waits(good: bytes) -> None:
    with pool_of(processes=1, turn_seconds=0.01) as pool, pool.turn() as turn:
        for _ in range(5):
            time.sleep(0.02)
            assert len(turn.decode(good)) == 1


def test_who_waits_too_long_is_told_that_the_server_is_busy(good: bytes) -> None:
    answers: list[object] = []
    with pool_of(processes=1, turn_seconds=1000, wait_seconds=0.1) as pool, pool.turn() as turn:
        _ask(pool, good, answers).join()
        assert answers == [Busy]
        assert len(turn.decode(good)) == 1


def test_a_turn_that_ends_between_two_files_costs_the_next_caller_nothing(good: bytes) -> None:
    answers: list[object] = []
    with pool_of(processes=1, turn_seconds=0.01, wait_seconds=120) as pool:
        with pool.turn() as turn:
            turn.decode(good)
            waiting = _ask(pool, good, answers)
            _wait_for(lambda: turn.over)
            with pytest.raises(Busy):
                turn.decode(good)
        waiting.join()

    assert answers == [1]


def test_the_files_of_one_caller_have_a_bound_of_their_own(good: bytes) -> None:
    with pool_of(request_seconds=0.05) as pool, pool.turn() as turn:
        turn.decode(good)
        time.sleep(0.06)
        with pytest.raises(Busy):
            turn.decode(good)


def test_callers_come_in_their_order(good: bytes) -> None:
    order: list[int] = []

    def work(number: int) -> None:
        with pool.turn() as turn:
            order.append(number)
            turn.decode(good)

    with pool_of(processes=1, turn_seconds=1000, wait_seconds=120) as pool:
        with pool.turn():
            threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
            for number, thread in enumerate(threads):
                thread.start()
                _wait_for(lambda number=number: len(pool._waiting) == number + 1)
        for thread in threads:
            thread.join()

    assert order == [0, 1, 2, 3, 4]


def test_no_more_callers_are_served_than_there_are_processes(good: bytes) -> None:
    answers: list[object] = []
    with pool_of(processes=2, turn_seconds=1000, wait_seconds=0.2) as pool:
        with pool.turn(), pool.turn():
            _ask(pool, good, answers).join()
        with pool.turn():
            _ask(pool, good, answers).join()

    assert answers == [Busy, 1]


def test_a_pool_whose_fork_server_was_ended_makes_another(good: bytes) -> None:
    with pool_of(processes=1) as pool, pool.turn() as turn:
        turn.decode(good)
        pool._server._process.kill()
        turn._decoder.close()

        assert len(turn.decode(good)) == 1


def test_closing_a_pool_leaves_no_process(good: bytes) -> None:
    before = set(psutil.Process().children(recursive=True))
    with pool_of(processes=2) as pool, pool.turn() as one, pool.turn() as two:
        assert len(one.decode(good)) == len(two.decode(good)) == 1
        made = set(psutil.Process().children(recursive=True)) - before
        assert len(made) == 3  # the fork server and two decoders

    _gone, alive = psutil.wait_procs(made, timeout=30)
    assert not alive
