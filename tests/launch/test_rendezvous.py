"""Ranks meet in a file on one machine, and else at a single known address."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import FileStore, Store

from medspark.launch.ranks.rendezvous import is_spread, open_store, pass_on, take_over
from medspark.launch.ranks.reports import Failure

PLACE = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4242"}


def _listening() -> set[tuple[str, int]]:
    found = psutil.Process().net_connections("tcp")
    return {tuple(c.laddr) for c in found if c.status == psutil.CONN_LISTEN}


def _spread(rank: int, port: int, host: str = "127.0.0.1") -> dict[str, str]:
    told = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": str(port)}
    return told | pass_on(told)


def _free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@given(st.fixed_dictionaries({name: st.text() for name in PLACE}))
def test_what_was_passed_on_takes_the_place_of_what_torchrun_says(place: dict[str, str]) -> None:
    below = {**dict.fromkeys(PLACE, "torchrun's"), "HOME": "/root"} | pass_on(place)
    assert is_spread(below)

    take_over(below)

    assert {name: below[name] for name in PLACE} == place
    assert below["HOME"] == "/root"


def test_on_one_machine_torchrun_is_believed() -> None:
    told = dict(PLACE)

    take_over(told)

    assert told == PLACE
    assert not is_spread(told)


@pytest.mark.parametrize("told", [PLACE | {"RANK": "0"}, _spread(0, 4242) | {"WORLD_SIZE": "1"}])
def test_ranks_of_one_machine_meet_in_a_file_and_nobody_listens(
    told: dict[str, str], tmp_path: Path
) -> None:
    before = _listening()

    store = open_store(tmp_path, timeout_s=5, environment=told)
    store.set("key", "value")

    assert isinstance(store, FileStore)
    assert FileStore(str(tmp_path / "ranks"), 3).get("key") == b"value"
    assert _listening() == before


def test_spread_ranks_meet_at_the_masters_address_and_at_no_other(tmp_path: Path) -> None:
    port, before = _free_port(), _listening()
    opened: dict[int, Store] = {}

    def open_one(rank: int) -> None:
        opened[rank] = open_store(tmp_path, timeout_s=20, environment=_spread(rank, port))

    others = threading.Thread(target=open_one, args=(1,))
    others.start()
    open_one(0)
    others.join()
    opened[1].set("key", "value")

    assert opened[0].get("key") == b"value"
    assert _listening() - before == {("127.0.0.1", port)}
    opened.clear()


def test_a_port_that_was_taken_meanwhile_is_told_as_such(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="in use") as error:
            open_store(tmp_path, timeout_s=5, environment=_spread(0, taken.getsockname()[1]))

    assert Failure(rank=0, sentence="", traceback=str(error.value)).port_taken


def test_a_store_waits_no_longer_than_it_is_told(tmp_path: Path) -> None:
    store: Any = open_store(tmp_path, timeout_s=0.2, environment=PLACE)
    assert store.timeout.total_seconds() == 0.2

    with pytest.raises(RuntimeError, match=r"[Tt]imeout"):
        store.get("what nobody says")
