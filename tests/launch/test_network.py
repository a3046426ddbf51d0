"""The interface that ranks talk over."""

from __future__ import annotations

import psutil

from medspark.launch.ranks.network import choose_interface


def _loopback() -> str:
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == "127.0.0.1" for entry in addresses):
            return str(name)
    raise AssertionError("no loopback interface")


def test_what_the_user_set_is_never_overridden() -> None:
    assert choose_interface("127.0.0.1", environment={"GLOO_SOCKET_IFNAME": "ib0"}) == "ib0"


def test_a_master_on_this_machine_is_reached_over_loopback() -> None:
    assert choose_interface("localhost", environment={}) == _loopback()
    assert choose_interface("127.0.0.1", environment={}) == _loopback()


def test_the_interface_owns_the_route_to_the_master() -> None:
    owned = {
        entry.address: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family.name == "AF_INET" and not entry.address.startswith("127.")
    }
    for address, name in owned.items():
        assert choose_interface(address, environment={}) == name


def test_a_name_that_nobody_knows_leaves_the_choice_to_gloo() -> None:
    assert choose_interface("no-such-host.invalid", environment={}) == ""
