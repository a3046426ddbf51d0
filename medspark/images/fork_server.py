"""Start decoder processes quickly, as forks of a server that has loaded the libraries.

The server itself never decodes. A fork takes milliseconds, a new interpreter half a second of CPU
time. Only the server kills and reaps its forks, so a reused process id is never killed.
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
    """A process that forks decoders on request. Several threads may use it."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._line, child_end = socket.socketpair()
        with child_end:
            # A single thread, since fork copies only the calling thread.
            threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
            self._process = interpreter(__name__, child_end, **threads)
        self._line.settimeout(START_SECONDS)

    def fork(self, line: socket.socket) -> Fork:
        """Return a new decoder process that serves ``line``. Raises RunError if there is none."""
        with self._turn:
            try:
                return self._forked(line)
            except OSError:  # the server was killed, for example when memory ran out
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
        """Kill the fork ``pid`` if it still runs."""
        with self._turn, contextlib.suppress(OSError):
            self._line.sendall(_NUMBER.pack(pid))
            self._answer()

    def _answer(self) -> int:
        answer = self._line.recv(_NUMBER.size, socket.MSG_WAITALL)
        if len(answer) < _NUMBER.size:
            raise ConnectionError
        return int(_NUMBER.unpack(answer)[0])

    def close(self) -> None:
        """Kill the server. Each fork ends when its socket is closed."""
        self._line.close()
        self._process.kill()
        self._process.wait()


class Fork:
    """A decoder process of the server, with the methods of guard.Process."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server, self.pid = server, pid

    def kill(self) -> None:
        """Kill the process. The server reaps it."""
        self._server.end(self.pid)

    def wait(self) -> None:
        """Return at once: ``kill`` returns after the server has reaped the fork."""


def _serve(line: socket.socket) -> None:
    """Fork and kill decoders on the commands of ``line``, until it is closed."""
    forks: set[int] = set()
    while True:
        order, descriptors, _, _ = socket.recv_fds(line, _NUMBER.size, 1)
        if not order:
            return
        (pid,) = _NUMBER.unpack(order)
        if descriptors:
            pid = os.fork()
            if pid == 0:
                _decode_until_closed(descriptors[0], line)
            os.close(descriptors[0])
            forks.add(pid)
        elif pid in forks:  # a fork that has died stays a zombie until here
            forks.remove(pid)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        line.sendall(_NUMBER.pack(pid))


def _decode_until_closed(descriptor: int, line: socket.socket) -> NoReturn:
    try:
        line.close()
        serve_decoder(descriptor)
    finally:
        os._exit(0)  # never return into the server's loop


if __name__ == "__main__":
    # Ctrl-C is for the parent, which then closes the line.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Image.init()  # load Pillow's readers once, not in each fork
    with contextlib.suppress(OSError):
        _serve(socket.socket(fileno=int(sys.argv[1])))
