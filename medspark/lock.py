"""One writer at a time for a folder, by a kernel lock, or by a lease where locks do not exist.

A kernel lock ends with its process, however the process ends. Databricks volumes, other FUSE mounts
and object stores have no locks. There a lease file says who holds the folder and until when. The
holder renews it; a lease that is not renewed expires, and the next writer takes the folder over.

Object stores write a lease only if nobody has changed it (If-None-Match, If-Match), so of two
writers at once one gets the folder.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from medspark import storage
from medspark.errors import MedsparkError, RunError, UsageError

__all__ = ["locked"]

_LOGGER = logging.getLogger(__name__)

LOCK, LEASE = ".lock", ".lease"
_LEASE_SECONDS = 60.0
# Time between writing a lease and checking it: another writer may do the same at the same moment.
_SETTLE_SECONDS = 0.5

_HELD = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@contextmanager
def locked(folder: str | Path) -> Iterator[Callable[[], bool]]:
    """Hold the existing ``folder`` for one writer.

    Yields a function that tells whether the folder is still held: a lease can be lost. Raises
    UsageError that names the holder if another process holds the folder, and RunError at the end if
    the lease was lost meanwhile.
    """
    url = storage.normalise(folder)
    if storage.is_local(url):
        descriptor = _lock(Path(url))
        if descriptor is not None:
            try:
                yield lambda: True
            finally:
                os.close(descriptor)
            return
    lease = _Lease(url)
    lease.take()
    try:
        yield lease.is_held
        lease.check()
    finally:
        lease.give_back()


def _lock(folder: Path) -> int | None:
    """Return the open descriptor that holds the kernel lock; None if the system has no locks."""
    descriptor = None
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(_holder()).encode())
        return descriptor
    except OSError as error:
        held = _parse_holder(os.read(descriptor, 1000)) if descriptor is not None else {}
        if descriptor is not None:
            os.close(descriptor)
        if error.errno in _NO_LOCKS:
            return None
        if error.errno in _HELD and descriptor is not None:
            raise _busy(folder, held) from None
        raise UsageError(f"{folder} cannot be locked: {error.strerror}.") from None


class _Lease:
    """The file that says who holds a folder, and until when."""

    def __init__(self, folder: str) -> None:
        self._folder, self._url = folder, storage.join(folder, LEASE)
        self._mine = _holder() | {"token": secrets.token_hex(8)}
        self._version: str | None = None  # of the lease that was found, then of ours
        self._lost = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def take(self) -> None:
        """Take the folder. Raises UsageError if another lease on it has not expired."""
        there, self._version = self._read()
        if there and float(there.get("expires", 0)) > time.time():
            raise _busy(self._folder, there)
        if there:
            _LOGGER.warning("the lease of %s on %s has expired", _by(there), self._folder)
        written = self._write()
        if not storage.is_object_store(self._url):
            time.sleep(_SETTLE_SECONDS)
            written = self._is_mine()
        if not written:
            raise _busy(self._folder, self._read()[0])
        self._thread.start()

    def is_held(self) -> bool:
        """Return whether no other process has taken the folder over."""
        return not self._lost and self._is_mine()

    def check(self) -> None:
        """Raise RunError if another process has taken the folder over."""
        if not self.is_held():
            by = _by(self._read()[0])
            raise RunError(
                f"{self._folder} was taken over ({by}) while this job wrote to it: its lease had "
                "not been renewed in time."
            )

    def give_back(self) -> None:
        """End the lease."""
        self._done.set()
        self._thread.join()
        with suppress(OSError, MedsparkError):  # then it expires
            if storage.is_object_store(self._url):
                # Removed, it could be another's by then. An empty lease is nobody's.
                storage.write_if(self._url, b"{}", self._version)
            elif self._is_mine():
                storage.remove_file(self._url)

    def _renew(self) -> None:
        while not self._done.wait(_LEASE_SECONDS / 4):
            try:
                self._lost = self._lost or not self._is_mine() or not self._write()
            except (OSError, MedsparkError) as error:
                _LOGGER.warning("the lease on %s was not renewed: %s", self._folder, error)

    def _is_mine(self) -> bool:
        return bool(self._read()[0].get("token") == self._mine["token"])

    def _read(self) -> tuple[dict[str, Any], str | None]:
        try:
            text, version = storage.read_version(self._url)
        except FileNotFoundError:
            return {}, None
        return _parse_holder(text), version

    def _write(self) -> bool:
        """Write the lease, unless another process has written one; return whether it did."""
        text = json.dumps(self._mine | {"expires": time.time() + _LEASE_SECONDS}).encode()
        written, version = storage.write_if(self._url, text, self._version)
        if written:
            self._version = version
        return written


def _holder() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"process": os.getpid(), "host": socket.gethostname(), "since": since}


def _parse_holder(text: bytes) -> dict[str, Any]:
    try:
        holder = json.loads(text)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _by(holder: dict[str, Any]) -> str:
    named = (holder.get(key, "unknown") for key in ("process", "host", "since"))
    return "process {} on {} since {}".format(*named)


def _busy(folder: str | Path, holder: dict[str, Any]) -> UsageError:
    until = f"; its lease ends {_until(holder)}" if "expires" in holder else ""
    return UsageError(
        f"Another job is writing {folder} ({_by(holder)}{until}); try again when it is done."
    )


def _until(holder: dict[str, Any]) -> str:
    return time.strftime("%H:%M:%S %z", time.localtime(float(holder["expires"])))
