"""Notice clients that kill or hold up their task, so that a round can go on without them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from medspark.federate.folder import FederationFolder

__all__ = ["Deadline", "Progress"]


class Progress:
    """The clients that a part began and ended, so that a second attempt knows who killed it."""

    def __init__(self, folder: FederationFolder, number: int, part: int) -> None:
        file = folder.round(number) / f"progress-{part:05d}.txt"
        # Opened once: a client of a small network takes little longer than opening a file.
        self._file = file.open("a+", buffering=1)
        self._file.seek(0)
        before = self._file.read().split("\n")
        begun = [line[1:] for line in before if line.startswith("+")]
        ended = [line[1:] for line in before if line.startswith("-")]
        self._deaths = {int(c): begun.count(c) - ended.count(c) for c in set(begun)}

    def deaths(self, client: int) -> int:
        """Return how many times a task ended while it trained ``client``."""
        return self._deaths.get(client, 0)

    @contextmanager
    def of(self, *clients: int) -> Iterator[None]:
        """Note that ``clients`` begin and end. An end is noted after an exception as well."""
        self._file.write("".join(f"+{client}\n" for client in clients))
        try:
            yield
        finally:
            self._file.write("".join(f"-{client}\n" for client in clients))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Deadline:
    """Ends this process if clients train for too long; Spark then starts the task again.

    One client is left out. Of several that train at once nobody is: they train alone then.
    """

    def __init__(self, folder: FederationFolder, deadline: float) -> None:
        self._folder, self._deadline = folder, deadline
        self._training: tuple[int, Sequence[int], float] | None = None
        self._thread: threading.Thread | None = None

    def of(self, number: int, clients: Sequence[int]) -> Deadline:
        self._training = number, clients, time.monotonic()
        if self._thread is None:
            self._thread = threading.Thread(target=self._follow, name="deadline", daemon=True)
            self._thread.start()
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self._training = None

    def _follow(self) -> None:
        while True:
            time.sleep(min(0.25, self._deadline / 4))
            training = self._training
            if training is not None and time.monotonic() - training[2] > self._deadline:
                number, clients, _ = training
                reason = f"it had not answered after {self._deadline:g} s"
                if len(clients) == 1:
                    self._folder.leave_out(number, clients[0], reason)
                os._exit(1)
