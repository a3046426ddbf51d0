"""The network interface that ranks use."""

from __future__ import annotations

import psutil
import pytest

from medspark.launch.ranks import network
from medspark.launch.ranks.network import choose_interface, own_address


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


@pytest.mark.parametrize(
    ("master", "address"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("another-host", "10.1.2.3"),
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        # As on Debian: a machine maps its own name to loopback, and other machines do not.
        ("this-host", "10.1.2.3"),
        ("nobody", ""),
    ],
)
def test_a_machine_is_reached_by_the_address_that_the_others_know(
    master: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = {"127.0.0.1": "127.0.0.1", "localhost": "127.0.0.1", "this-host": "127.0.1.1"}
    ways |= dict.fromkeys(["10.1.2.3", "another-host", network._ANYWHERE], "10.1.2.3")
    monkeypatch.setattr(network, "_source_address", lambda name: ways.get(name, ""))

    assert own_address(master) == address


def test_a_machine_without_a_network_is_reached_by_what_its_name_means(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ways = {"this-host": "127.0.1.1"}
    monkeypatch.setattr(network, "_source_address", lambda name: ways.get(name, ""))

    assert own_address("this-host") == "127.0.1.1"
