"""MLflow's own servers, as processes of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Return a function that starts an MLflow command and returns the address that it serves at.

    It is there when ``page`` can be had, and ends with the tests of the module.
    """
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str, page: str, **environment: str) -> str:
        port, folder = _free_port(), tmp_path_factory.mktemp("server")
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", *command),
                    *("--port", str(port), "--workers", "1"),
                ],
                cwd=folder,
                env=os.environ | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        started.append(process)
        address = f"http://127.0.0.1:{port}"
        _wait_for(f"{address}/{page}", folder / "log")
        return address

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(page: str, log: Path, *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(page, timeout=2):
            return
        time.sleep(0.25)
    raise TimeoutError(f"{page} is not served: {log.read_text()[-2000:]}")
