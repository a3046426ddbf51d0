"""The rendezvous of the ranks: in a file of their machine, or at a socket of rank 0's host.

torch's own choice listens on all interfaces. On one machine nothing has to listen; across machines
rank 0 listens on the one address that the others know.
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

from medspark.launch.ranks.network import own_address

if TYPE_CHECKING:  # seconds to import, and the environment has to be set before
    from torch.distributed import Store  # type: ignore[attr-defined]

__all__ = ["is_spread", "open_store", "pass_on", "take_over"]

# torchrun gives a rank its own values of these, and an agent of one rank calls that rank 0 of 1.
_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PREFIX = "MEDSPARK_"
_FILE = "ranks"


def pass_on(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what tells a rank below an agent of its own who it is among all of them."""
    return {_PREFIX + name: environment[name] for name in _NAMES}


def take_over(environment: MutableMapping[str, str] = os.environ) -> None:
    """Put what was passed on in the place of what torchrun says; nothing was on one machine."""
    for name in _NAMES:
        if _PREFIX + name in environment:
            environment[name] = environment[_PREFIX + name]


def is_spread(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the ranks have an agent each, as on several machines."""
    return _PREFIX + "MASTER_ADDR" in environment


def open_store(
    folder: Path, *, timeout_s: float, environment: Mapping[str, str] = os.environ
) -> Store:
    """Return the store in which the ranks find each other.

    Where they are spread, rank 0 listens on the address by which MASTER_ADDR is reached, and on no
    other; on one machine the store is a file in ``folder``, which is this user's alone. Raises
    OSError where the port that was chosen has been taken since.
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
    here = own_address(host) or host
    return TCPStore(
        here, port, size, is_master=True, timeout=timeout, master_listen_fd=_bound(here, port)
    )


def _bound(address: str, port: int) -> int:
    """Return a socket for the store to listen on; it belongs to the store from then on."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        return os.dup(listener.fileno())
