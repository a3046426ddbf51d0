"""The sentinel above a rank: it reports every end, and the rank ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SCRIPT = """
import os, signal, sys, time
from medspark.launch.ranks.sentinel import watch

class Witness:
    def ended(self, kind, cause): print(kind, cause, flush=True)
    def stopped(self, is_stopped, /): print("stopped" if is_stopped else "goes on", flush=True)

def work():
    print("child", os.getpid(), flush=True)
    exec(sys.argv[1])

sys.exit(watch(work, witness=Witness()))
"""
SLEEP = "time.sleep(60)"


def _start(work: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, work],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _child(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline().split()[1])


def _gone(pid: int) -> bool:
    for _ in range(50):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(("work", "status"), [("pass", 0), ("1/0", 1), ("sys.exit(3)", 1)])
def test_the_status_tells_whether_the_work_was_done(work: str, status: int) -> None:
    assert _start(work).wait(20) == status


def test_a_signal_is_reported() -> None:
    process = _start(SLEEP)
    os.kill(_child(process), signal.SIGKILL)

    said, _ = process.communicate(timeout=20)

    assert "killed was killed by SIGKILL" in said
    assert process.returncode != 0


def test_a_stopped_child_is_reported_and_still_ended() -> None:
    process = _start(SLEEP)
    child = _child(process)
    os.kill(child, signal.SIGSTOP)
    assert process.stdout is not None
    assert process.stdout.readline() == "stopped\n"

    process.terminate()

    assert "terminated" in process.communicate(timeout=20)[0]
    assert _gone(child)


def test_the_child_dies_with_the_sentinel() -> None:
    process = _start(SLEEP)
    child = _child(process)

    process.kill()

    assert _gone(child)


def test_both_end_when_the_agent_above_is_killed(tmp_path: Path) -> None:
    agent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys\nsubprocess.run([sys.executable, '-c', *sys.argv[1:]])",
            SCRIPT,
            SLEEP,
        ],
        stdout=(tmp_path / "said").open("w"),
    )
    while "child" not in (tmp_path / "said").read_text():
        time.sleep(0.05)
    child = int((tmp_path / "said").read_text().split()[1])

    agent.kill()
    agent.wait()

    assert _gone(child)
    assert "agent_lost" in (tmp_path / "said").read_text()
