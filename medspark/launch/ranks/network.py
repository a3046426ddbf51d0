"""Choose the network interface that the ranks use."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping

import psutil

__all__ = ["choose_interface", "own_address"]

# A documentation address (RFC 5737). Looking up the route to it sends no packet.
_ANYWHERE = "192.0.2.1"


def choose_interface(master: str, *, environment: Mapping[str, str] = os.environ) -> str:
    """Return the interface of the route to ``master``; empty if there is none.

    gloo's default is the interface that the host name resolves to. On many clusters that is
    loopback, and ranks of other machines cannot connect. A GLOO_SOCKET_IFNAME set by the user takes
    precedence.
    """
    chosen = environment.get("GLOO_SOCKET_IFNAME")
    if chosen:
        return chosen
    address = own_address(master)
    return _owner(address) if address else ""


def own_address(master: str) -> str:
    """Return this machine's address on the route to ``master``; empty if there is no route.

    On the master, it is the address by which the other machines reach it.
    """
    address = _source_address(master)
    if address and _is_loopback(address) and not _means_this_machine(master):
        # The master's own name, which only the master maps to 127.0.1.1.
        address = _source_address(_ANYWHERE) or address
    return address


def _source_address(destination: str) -> str:
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            destination, 9, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def _means_this_machine(master: str) -> bool:
    if master == "localhost":
        return True
    try:
        return _is_loopback(master)
    except ValueError:
        return False


def _owner(address: str) -> str:
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.address.split("%")[0] == address:
                return str(name)
            if _is_loopback(address) and entry.address in {"127.0.0.1", "::1"}:
                return str(name)
    return ""
