"""A pool of guarded decoders for a server: callers take turns, so that none blocks the others."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import Field

from medspark.config import Config
from medspark.images.fork_server import ForkServer
from medspark.images.frame import Frame
from medspark.images.guard import GuardedDecoder
from medspark.images.limits import Limits
from medspark.images.reasons import Reason, Unreadable
from medspark.images.rendering import Rendering

__all__ = ["Busy", "DecoderPool", "Turn", "Turns"]

_LOOK_SECONDS = 0.1  # between two checks for a turn that may be interrupted


class Turns(Config):
    """How callers share the decoders."""

    processes: int = Field(
        3, ge=1, description="most decoder processes, and callers served at once"
    )
    turn_seconds: float = Field(1.0, gt=0, description="longest turn while others wait, in seconds")
    wait_seconds: float = Field(
        10.0, gt=0, description="longest wait for a decoder process, in seconds"
    )
    request_seconds: float = Field(
        50.0, gt=0, description="longest time for the files of one caller, in seconds"
    )


class Busy(Exception):  # noqa: N818 - the sentence reads "raise Busy"
    """A caller's turn is over or did not start. The caller has to request the rest again."""


class Turn:
    """A caller's time with a decoder, for use by one thread."""

    def __init__(self, decoder: GuardedDecoder, turns: Turns) -> None:
        self._decoder, self._turns = decoder, turns
        self._began = time.monotonic()
        self._over = False

    def decode(self, source: bytes) -> list[Frame]:
        """Return the frames of ``source``. Raises Unreadable, and Busy once the turn is over."""
        if self._over or self.seconds > self._turns.request_seconds:
            raise Busy
        try:
            return list(self._decoder.decode(source))
        except Unreadable as unreadable:
            if self._over and unreadable.reason is Reason.DECODER_CRASHED:
                raise Busy from None
            raise

    @property
    def seconds(self) -> float:
        """The seconds since the turn began."""
        return time.monotonic() - self._began

    @property
    def over(self) -> bool:
        """Whether another thread has ended the turn."""
        return self._over

    @property
    def may_end(self) -> bool:
        """Whether the turn has lasted ``turn_seconds``, so that it may be ended."""
        return self.seconds >= self._turns.turn_seconds

    def end(self) -> None:
        """End the turn from another thread, and kill its decoder process."""
        self._over = True
        self._decoder.interrupt()


class DecoderPool:
    """Decoders that callers use in turns, first come, first served.

    While others wait, the oldest turn ends once it has lasted ``turn_seconds``. So files that are
    crafted to decode for ever delay the other callers by that time at most.
    """

    def __init__(self, *, rendering: Rendering, limits: Limits, turns: Turns) -> None:
        self._turns = turns
        self._server = ForkServer()
        self._idle = [
            GuardedDecoder(rendering=rendering, limits=limits, start=self._server.fork)
            for _ in range(turns.processes)
        ]
        self._running: list[Turn] = []  # the oldest first
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def turn(self) -> Iterator[Turn]:
        """Lend a decoder. Raises Busy if there is none within ``wait_seconds``."""
        decoder = self._next_decoder()
        turn = Turn(decoder, self._turns)
        with self._changed:
            self._running.append(turn)
        try:
            yield turn
        finally:
            with self._changed:
                self._running.remove(turn)
                if turn.over:
                    decoder.close()  # its process was killed, perhaps between two files
                self._idle.append(decoder)
                self._changed.notify_all()

    def _next_decoder(self) -> GuardedDecoder:
        ticket, deadline = object(), time.monotonic() + self._turns.wait_seconds
        with self._changed:
            self._waiting.append(ticket)
            try:
                while not (self._idle and self._waiting[0] is ticket):
                    if time.monotonic() > deadline:
                        raise Busy
                    if self._waiting[0] is ticket:
                        self._end_oldest()
                    self._changed.wait(_LOOK_SECONDS)
                return self._idle.pop()
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def _end_oldest(self) -> None:
        oldest = next(iter(self._running), None)
        if oldest is not None and oldest.may_end:
            oldest.end()

    def close(self) -> None:
        """Kill all decoder processes. No turn may be running."""
        for decoder in self._idle:
            decoder.close()
        self._server.close()
