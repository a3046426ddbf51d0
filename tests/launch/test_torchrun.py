"""A torchrun agent: its command and environment, and its end with the waiting process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medspark.launch.ranks import torchrun
from medspark.launch.ranks.process_mark import MARK
from medspark.launch.ranks.rank import Order

PLACE = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4242"}


class Agent:
    """Replaces a process, and records how it was started."""

    started: list[tuple[list[str], dict[str, str]]]

    def __init__(self, command: list[str], *, env: dict[str, str], **_: Any) -> None:
        self.started.append((command, env))

    def wait(self) -> int:
        return 0

    def poll(self) -> int:
        return 0


@pytest.fixture
def order(tmp_path: Path) -> Order:
    return Order(
        function="f", config_class="c", config={}, folder=tmp_path, journal=tmp_path, nonce="n",
        threads=3, timeout_seconds=1,
    )  # fmt: skip


def _started(
    order: Order, monkeypatch: pytest.MonkeyPatch, *, local: bool
) -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment of the started agent."""
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Agent, "started", [], raising=False)
    monkeypatch.setattr(subprocess, "Popen", Agent)
    given = {"local_mode": local, "num_processes": 3}
    torchrun._start_agent(order, given, "/private/train.py")
    (agent,) = Agent.started
    return agent


@pytest.mark.parametrize(("local", "ranks"), [(True, 3), (False, 1)])
def test_an_agent_meets_nobody_but_itself_in_a_private_file(
    order: Order, monkeypatch: pytest.MonkeyPatch, local: bool, ranks: int
) -> None:
    command, environment = _started(order, monkeypatch, local=local)

    assert command[:3] == [sys.executable, "-m", torchrun.WRAPPER]
    assert {"--nnodes=1", f"--nproc_per_node={ranks}"} <= set(command)
    assert {"--rdzv_backend=c10d", "--rdzv_conf=store_type=file"} <= set(command)
    assert "--rdzv_endpoint=/private/agent" in command
    assert command[-1] == "/private/train.py"
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_the_rank_of_a_task_is_told_who_it_is_and_ranks_of_one_machine_are_not(
    order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, spread = _started(order, monkeypatch, local=False)
    _, local = _started(order, monkeypatch, local=True)

    told = {f"MEDSPARK_{name}": value for name, value in PLACE.items()}
    assert told.items() <= spread.items()
    assert not told.keys() & local.keys()
    assert (order.folder / "torchrun-1.log").exists()  # of rank 1's agent
    assert (order.folder / "torchrun-0.log").exists()


def test_an_agent_and_all_below_it_carry_the_mark_and_the_threads(
    order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, environment = _started(order, monkeypatch, local=True)

    assert environment[MARK] == order.mark
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["PYTHONIOENCODING"] == "utf-8:backslashreplace"


@pytest.mark.parametrize("obeys", [True, False])
def test_an_agent_for_which_nobody_waits_any_more_is_ended(
    order: Order, monkeypatch: pytest.MonkeyPatch, obeys: bool
) -> None:
    code = "import signal, time; print(flush=True)\n" + (
        "" if obeys else "signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True)\n"
    )
    agent = subprocess.Popen(
        [sys.executable, "-c", code + "time.sleep(60)"], stdout=subprocess.PIPE
    )
    assert agent.stdout is not None
    for _ in range(1 if obeys else 2):
        agent.stdout.readline()
    monkeypatch.setattr(torchrun, "_END_SECONDS", 30 if obeys else 0.2)

    torchrun._end(agent)

    assert agent.wait(30) == (-15 if obeys else -9)
