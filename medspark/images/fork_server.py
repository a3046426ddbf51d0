"""Decoder processes at once: forks of a process that has loaded the libraries, and never decodes.

A fork is there in milliseconds, where a new interpreter takes half a second of a core. Only the
server ends and reaps its forks, so that no process of another number is ever met.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import sys
import threading
from typing import NoReturn

from PIL import Image

from medspark.errors import RunError
from medspark.images.guard import START_SECONDS, interpreter, serve_decoder

__all__ = ["Fork", "ForkServer"]

_NUMBER = struct.Struct("i")


class ForkServer:
    """A process that forks decoders when asked; may be asked by several threads."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._line, theirs = socket.socketpair()
        with theirs:
            # One thread: a fork has only the thread that forks.
            threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
            self._process = interpreter(__name__, theirs, **threads)
        self._line.settimeout(START_SECONDS)

    def fork(self, line: socket.socket) -> Fork:
        """Return a new decoder process that serves ``line``. Raises RunError if there is none."""
        with self._turn:
            try:
                return self._forked(line)
            except OSError:  # the server was ended, for example where memory ran out
                self.close()
                self._begin()
            try:
                return self._forked(line)
            except OSError:
                raise RunError("The decoder process could not be started.") from None

    def _forked(self, line: socket.socket) -> Fork:
        socket.send_fds(self._line, [_NUMBER.pack(0)], [line.fileno()])
        return Fork(self, self._answer())

    def end(self, pid: int) -> None:
        """End the fork ``pid``, if it still lives."""
        with self._turn, contextlib.suppress(OSError):
            self._line.sendall(_NUMBER.pack(pid))
            self._answer()

    def _answer(self) -> int:
        answer = self._line.recv(_NUMBER.size, socket.MSG_WAITALL)
        if len(answer) < _NUMBER.size:
            raise ConnectionError
        return int(_NUMBER.unpack(answer)[0])

    def close(self) -> None:
        """End the server; its forks end with their lines."""
        self._line.close()
        self._process.kill()
        self._process.wait()


class Fork:
    """A decoder process of a server; as much of Popen as its user needs."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server, self.pid = server, pid

    def kill(self) -> None:
        """End the process at once; the server reaps it."""
        self._server.end(self.pid)

    def wait(self) -> None:
        """Return at once: an ended fork is reaped by then."""


def _nurse(line: socket.socket) -> None:
    """Fork and end decoders as the commands on ``line`` say, until it is closed."""
    forks: set[int] = set()
    while True:
        order, descriptors, _, _ = socket.recv_fds(line, _NUMBER.size, 1)
        if not order:
            return
        (pid,) = _NUMBER.unpack(order)
        if descriptors:
            pid = os.fork()
            if pid == 0:
                _decode_for_good(descriptors[0], line)
            os.close(descriptors[0])
            forks.add(pid)
        elif pid in forks:  # a fork that died by itself is kept as a zombie until here
            forks.remove(pid)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        line.sendall(_NUMBER.pack(pid))


def _decode_for_good(descriptor: int, line: socket.socket) -> NoReturn:
    try:
        line.close()
        serve_decoder(descriptor)
    finally:
        os._exit(0)  # never back into the server's own loop


if __name__ == "__main__":
    # A Ctrl-C in the terminal is for the parent, which then closes the line.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Image.init()  # else each fork would load Pillow's readers anew
    with contextlib.suppress(OSError):
        _nurse(socket.socket(fileno=int(sys.argv[1])))
