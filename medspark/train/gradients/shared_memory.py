"""Memory that all ranks of one host map."""

from __future__ import annotations

import logging
import mmap
import os
from pathlib import Path

from medspark.train.world import World

__all__ = ["map_together"]

_LOGGER = logging.getLogger(__name__)
_TOKEN_BYTES = 16


def map_together(world: World, size: int) -> mmap.mmap | None:
    """Return ``size`` bytes that all ranks map, or None on every rank.

    The memory has no name and ends with the last process that maps it. It needs Linux, and all
    ranks on one host, in one namespace of processes, and of one user.
    """
    made = _memory(size) if world.is_main else -1
    try:
        if len(set(world.gather(_host()))) > 1:
            return None
        mapped = _mapped(os.getpid(), made, size) if made >= 0 else None
        if mapped is not None:
            mapped[:_TOKEN_BYTES] = os.urandom(_TOKEN_BYTES)
        process, descriptor, token = world.gather(_offer(made, mapped))[0].split()
        if not world.is_main and int(descriptor) >= 0:
            mapped = _mapped(int(process), int(descriptor), size)
        # Machines that were copied while they ran have equal names.
        same = mapped is not None and mapped[:_TOKEN_BYTES].hex() == token
        if not all(world.gather(same)):
            _LOGGER.info("the ranks of this host have no memory in common: they use sockets")
            return None
        return mapped
    finally:
        if made >= 0:
            os.close(made)


def _offer(descriptor: int, mapped: mmap.mmap | None) -> str:
    token = "none" if mapped is None else mapped[:_TOKEN_BYTES].hex()
    return f"{os.getpid()} {descriptor} {token}"


def _host() -> str:
    """Return what names this host and its namespace of processes, for as long as it runs."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return f"{boot.strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"unknown {os.urandom(_TOKEN_BYTES).hex()}"


def _memory(size: int) -> int:
    """Return the descriptor of new memory, -1 if there is none."""
    try:
        descriptor = os.memfd_create("medspark-gradients")
    except (AttributeError, OSError):
        return -1
    try:
        os.posix_fallocate(descriptor, 0, size)  # otherwise a full memory is a SIGBUS later
    except OSError:
        os.close(descriptor)
        return -1
    return descriptor


def _mapped(process: int, descriptor: int, size: int) -> mmap.mmap | None:
    try:
        with Path(f"/proc/{process}/fd/{descriptor}").open("r+b", buffering=0) as file:
            return mmap.mmap(file.fileno(), size)
    except (OSError, ValueError):
        return None
