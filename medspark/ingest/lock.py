"""One writer at a time for a dataset's folder."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medspark.errors import UsageError
from medspark.ingest import storage

_NAME = ".lock"


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Hold ``folder``, made if it is not there, for one writer.

    Raises UsageError where another one has it. On a local file system a lock ends with its
    process, however that ends; an object store cannot tell, so there the user is asked.
    """
    storage.make_folder(folder)
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    held = _held_here if storage.is_local(folder) else _held_elsewhere
    with held(storage.join(folder, _NAME), holder):
        yield


@contextmanager
def _held_here(path: str, holder: str) -> Iterator[None]:
    with open(Path(path), "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UsageError(
                f"Another job is writing {Path(path).parent} ({file.read().strip()}); "
                "try again when it is done."
            ) from None
        file.truncate(0)
        file.write(holder)
        file.flush()
        yield


@contextmanager
def _held_elsewhere(url: str, holder: str) -> Iterator[None]:
    if not storage.create(url, holder):
        raise UsageError(
            f"Another job is writing here ({storage.read_text(url)}); if it is not running any "
            f"more, remove {url}."
        )
    try:
        yield
    finally:
        storage.remove(url)
