"""Decode in a child process with limits of time and memory, so that a bad file harms only itself.

A child decodes many files. If a file takes too long or crashes the child, the file is reported as
Unreadable and the child is replaced.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socket, socketpair
from types import TracebackType
from typing import Any, Protocol

from medspark.errors import RunError
from medspark.images.decode import Source, decode
from medspark.images.deidentify import Privacy, Pseudonyms
from medspark.images.dicom import NotPlain
from medspark.images.frame import Frame
from medspark.images.limits import Limits
from medspark.images.reasons import Reason, Unreadable
from medspark.images.rendering import Rendering

START_SECONDS = 120.0  # longest start of an interpreter with the decoders, on a busy machine
_DONE = None


class Process(Protocol):
    """The part of subprocess.Popen that GuardedDecoder needs of a decoder process."""

    pid: int

    def kill(self) -> None:
        """Kill the process."""

    def wait(self) -> Any:
        """Return once the process has ended."""


Start = Callable[[socket], Process]  # starts a process that serves the socket


class GuardedDecoder:
    """``decode`` with fixed settings, run in a child process within limits.

    Use it as a context manager, or call ``close``. It may be pickled before its first use.
    ``start`` starts the child, by default as a new interpreter.
    """

    def __init__(
        self,
        *,
        rendering: Rendering,
        limits: Limits | None = None,
        pseudonyms: Pseudonyms | None = None,
        privacy: Privacy | None = None,
        start: Start | None = None,
    ) -> None:
        self._start = start or _interpreter
        self._limits = limits or Limits()
        self._settings: dict[str, Any] = {
            "rendering": rendering,
            "limits": self._limits,
            "pseudonyms": pseudonyms,
            "privacy": privacy,
        }
        self._child: _Child | None = None

    def decode(self, source: str | Path | bytes) -> Iterator[Frame]:
        """Yield the frames of ``source`` (a local path or the file's bytes). Raises Unreadable.

        An uncompressed DICOM file of one frame is decoded in this process, by Python and NumPy: it
        cannot exceed a limit, and sending it to the child would cost as much as decoding it.
        """
        try:
            yield from decode(source, **self._settings, plain_only=True)
        except NotPlain:
            yield from self._guarded(source)

    def _guarded(self, source: str | Path | bytes) -> Iterator[Frame]:
        if self._child is None:
            self._child = _Child(self._settings, self._limits, self._start)
        finished = False
        try:
            yield from self._frames(self._child, source)
            finished = True
        except Unreadable as unreadable:
            finished = unreadable.reason not in (Reason.DECODE_TIMEOUT, Reason.DECODER_CRASHED)
            raise
        finally:
            # A caller that stops early leaves frames in the pipe, so this child must go.
            if not finished:
                self.close()

    def _frames(self, child: _Child, source: Source) -> Iterator[Frame]:
        child.send(source)
        left = self._limits.file_seconds  # time of waiting; the caller's time does not count
        while True:
            start = time.monotonic()
            answer = child.receive(min(self._limits.frame_seconds, left))
            left -= time.monotonic() - start
            if answer is _DONE:
                return
            if isinstance(answer, Unreadable):
                raise answer
            yield answer

    def interrupt(self) -> bool:
        """Kill the child while another thread decodes with it; return whether there is a child.

        That thread gets Unreadable, as after any death of the child.
        """
        child = self._child
        if child is not None:
            child.end()
        return child is not None

    def close(self) -> None:
        """Kill the child process, if there is one."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def __enter__(self) -> GuardedDecoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_child": None}


class _Child:
    """A decoder process and the socket to it."""

    def __init__(self, settings: dict[str, Any], limits: Limits, start: Start) -> None:
        parent_end, child_end = socketpair()
        with child_end:
            self._process = start(child_end)
        self._line: Connection[Any, Any] = Connection(parent_end.detach())
        try:
            self.send(settings)
            started = self.receive(START_SECONDS)
        except Unreadable:
            started = False
        if not started:
            self.kill()
            raise RunError("The decoder process could not be started.")
        _limit_memory(self._process.pid, limits.memory_bytes)

    def send(self, message: object) -> None:
        """Send ``message``. Raises Unreadable if the process is gone."""
        try:
            self._line.send(message)
        except OSError:
            raise Unreadable(Reason.DECODER_CRASHED) from None

    def receive(self, seconds: float) -> Any:
        """Return the next message. Raises Unreadable if it is late or the process is gone."""
        try:
            if not self._line.poll(max(0.0, seconds)):
                raise Unreadable(Reason.DECODE_TIMEOUT)
            return self._line.recv()
        except (EOFError, OSError):
            raise Unreadable(Reason.DECODER_CRASHED) from None

    def end(self) -> None:
        """Kill the process. A thread that waits for its answer gets Unreadable."""
        self._process.kill()

    def kill(self) -> None:
        """Kill the process and reap it."""
        self._line.close()
        self.end()
        self._process.wait()


def interpreter(module: str, line: socket, **environment: str) -> subprocess.Popen[bytes]:
    """Start ``module`` in a new interpreter; its argument is the file descriptor of ``line``."""
    paths = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return subprocess.Popen(
        [sys.executable, "-m", module, str(line.fileno())],
        pass_fds=[line.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # messages of native decoders may quote the file
        env=os.environ | {"PYTHONPATH": paths} | environment,
    )


def _interpreter(line: socket) -> Process:
    return interpreter("medspark.images.guard", line)


def _limit_memory(pid: int, size: int) -> None:
    """Limit the further address space of ``pid`` to ``size`` bytes (on Linux only)."""
    if hasattr(resource, "prlimit"):
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[0])
        allowed = pages * resource.getpagesize() + size
        resource.prlimit(pid, resource.RLIMIT_AS, (allowed, allowed))


def serve_decoder(descriptor: int) -> None:
    """Decode the files that arrive on the socket ``descriptor`` until it is closed."""
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _serve(Connection(descriptor))


def _serve(line: Connection[Any, Any]) -> None:
    settings = line.recv()
    line.send(True)
    while True:
        source = line.recv()
        try:
            for frame in _timed(decode(source, **settings), settings["limits"].frame_seconds):
                line.send(frame)
        except Unreadable as unreadable:
            line.send(unreadable)
        else:
            line.send(_DONE)


def _timed(frames: Iterator[Frame], seconds: float) -> Iterator[Frame]:
    """Yield ``frames``. End this process if a frame takes far too long.

    The parent kills this process earlier, unless the parent itself is gone.
    """
    while True:
        signal.alarm(math.ceil(seconds) + 10)
        try:
            frame = next(frames, None)
        finally:
            signal.alarm(0)
        if frame is None:
            return
        yield frame


def _main() -> None:
    # Ctrl-C is for the parent, which then closes the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve_decoder(int(sys.argv[1]))


if __name__ == "__main__":
    _main()
