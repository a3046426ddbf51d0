"""Open the rendezvous store of the ranks: a file on one machine, or a socket on rank 0's host.

torch's default store listens on all interfaces. A file needs no listener. Across machines, rank 0
listens only on the address that the other ranks connect to.
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

from medspark.launch.ranks.network import own_address

if TYPE_CHECKING:  # the import takes seconds, and the environment must be set before it
    from torch.distributed import Store  # type: ignore[attr-defined]

__all__ = ["is_spread", "open_store", "pass_on", "take_over"]

# torchrun sets these for its ranks. An agent with a single rank would set rank 0 of 1.
_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PREFIX = "MEDSPARK_"
_FILE = "ranks"


def pass_on(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that pass the global rank and master through a rank's own agent."""
    return {_PREFIX + name: environment[name] for name in _NAMES}


def take_over(environment: MutableMapping[str, str] = os.environ) -> None:
    """Replace torchrun's variables by those of ``pass_on``. On one machine there are none."""
    for name in _NAMES:
        if _PREFIX + name in environment:
            environment[name] = environment[_PREFIX + name]


def is_spread(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether each rank has a separate agent, as on several machines."""
    return _PREFIX + "MASTER_ADDR" in environment


def open_store(
    folder: Path, *, timeout_s: float, environment: Mapping[str, str] = os.environ
) -> Store:
    """Return the store in which the ranks find each other.

    If the ranks are spread, rank 0 listens only on the address by which the others reach
    MASTER_ADDR. On one machine the store is a file in ``folder``, which must be private. Raises
    OSError if another process has taken the chosen port.
    """
    from torch.distributed import FileStore, TCPStore  # type: ignore[attr-defined]

    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    timeout = datetime.timedelta(seconds=timeout_s)
    if size == 1 or not is_spread(environment):
        store: Store = FileStore(str(folder / _FILE), size)
        store.set_timeout(timeout)
        return store
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    if rank > 0:
        return TCPStore(host, port, size, is_master=False, timeout=timeout)
    address = own_address(host) or host
    return TCPStore(
        address, port, size, is_master=True, timeout=timeout, master_listen_fd=_bound(address, port)
    )


def _bound(address: str, port: int) -> int:
    """Return the descriptor of a bound socket, which the store will own."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        return os.dup(listener.fileno())
