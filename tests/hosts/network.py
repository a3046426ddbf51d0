"""Hosts of a network of their own on one machine: namespaces, joined by a bridge in another one.

The machine's own network is not touched. Leaving the context removes everything.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from types import TracebackType
from typing import Self

__all__ = ["Network", "NotAllowed"]

_SUBNET = "10.77.0"


class NotAllowed(Exception):  # noqa: N818 - a reason to skip, not an error
    """The machine does not allow network namespaces."""


class Network:
    """Hosts by name, each with its own address; a link can be cut and restored."""

    def __init__(self, names: Sequence[str]) -> None:
        self._tag = f"ms{os.getpid() % 100_000}"
        self._numbers = {name: number for number, name in enumerate(names, start=1)}

    def __enter__(self) -> Self:
        try:
            self._build()
        except (OSError, subprocess.CalledProcessError) as error:
            self._remove()
            said = getattr(error, "stderr", "") or str(error)
            raise NotAllowed(f"network namespaces cannot be made here: {said.strip()}") from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()

    def address(self, name: str) -> str:
        """Return the address of a host."""
        return f"{_SUBNET}.{self._numbers[name]}"

    def on(self, name: str, *command: object) -> list[str]:
        """Return the command line that runs ``command`` on a host."""
        return ["ip", "netns", "exec", self._space(name), *map(str, command)]

    def cut(self, name: str) -> None:
        """Cut a host's link: its packets are dropped silently."""
        self._ip("-n", self._space("switch"), "link", "set", self._port(name), "nomaster")

    def mend(self, name: str) -> None:
        """Restore a host's link."""
        switch = self._space("switch")
        self._ip("-n", switch, "link", "set", self._port(name), "master", "bridge")

    def _build(self) -> None:
        switch = self._space("switch")
        self._ip("netns", "add", switch)
        self._ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        self._ip("-n", switch, "link", "set", "bridge", "up")
        for name in self._numbers:
            self._plug_in(name, switch)

    def _plug_in(self, name: str, switch: str) -> None:
        host, port = self._space(name), self._port(name)
        self._ip("netns", "add", host)
        self._ip("-n", switch, "link", "add", port, "type", "veth", "peer", "eth0", "netns", host)
        self._ip("-n", switch, "link", "set", port, "master", "bridge", "up")
        self._ip("-n", host, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
        self._ip("-n", host, "link", "set", "eth0", "up")
        self._ip("-n", host, "link", "set", "lo", "up")
        self._ip("-n", host, "route", "add", "default", "via", f"{_SUBNET}.254")

    def _remove(self) -> None:
        for name in [*self._numbers, "switch"]:
            subprocess.run(["ip", "netns", "del", self._space(name)], capture_output=True)

    def _space(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def _port(self, name: str) -> str:
        return f"port{self._numbers[name]}"

    @staticmethod
    def _ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
