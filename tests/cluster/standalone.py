"""A Spark cluster of processes on this machine: a master and workers, each with its own folder.

The workers' Python has the libraries but not medspark, as on a foreign cluster.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
from pathlib import Path
from types import TracebackType
from typing import Self

import pyspark

SPARK_HOME = Path(pyspark.__file__).parent
ROOT = Path(__file__).parents[2]


class StandaloneCluster:
    """A master and ``workers`` of one core each, ended with everything below them."""

    def __init__(self, folder: Path, *, workers: int = 2) -> None:
        self.folder = folder
        self.python = python_without_medspark(folder / "python")
        self._ports = _free_ports(2)
        self._master: subprocess.Popen[bytes] | None = None
        self.workers: dict[int, subprocess.Popen[bytes]] = {}
        self._wanted = workers

    @property
    def url(self) -> str:
        """The master's URL for spark-submit."""
        return f"spark://127.0.0.1:{self._ports[0]}"

    def __enter__(self) -> Self:
        self.start_master()
        for number in range(self._wanted):
            self.start_worker(number)
        self.wait_for_workers(self._wanted)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in [*self.workers.values(), self._master]:
            if process is not None:
                _end(process)

    def start_master(self) -> None:
        """Start the master; a restarted master keeps its address."""
        port, ui = self._ports
        self._master = self._start(
            "master", "master.Master", "--host", "127.0.0.1", "--port", port, "--webui-port", ui
        )

    def start_worker(self, number: int) -> None:
        """Start a worker, in the work folder of its number."""
        self.workers[number] = self._start(
            f"worker-{number}",
            "worker.Worker",
            *("--host", "127.0.0.1", "--webui-port", 0, "--cores", 1, "--memory", "1g"),
            *("--work-dir", self.folder / f"worker-{number}" / "work", self.url),
        )

    def kill_master(self) -> None:
        """Kill the master with SIGKILL."""
        assert self._master is not None
        self._master.kill()
        self._master.wait()

    def kill_worker(self, number: int) -> None:
        """Kill a worker with SIGKILL; its executor notices and ends."""
        self.workers[number].kill()
        self.workers.pop(number).wait()

    def wait_for_workers(self, count: int, *, seconds: float = 60) -> None:
        """Wait until the master has ``count`` workers."""
        deadline = time.monotonic() + seconds
        while self._alive() != count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._alive()} of {count} workers after {seconds} s")
            time.sleep(0.3)

    def submit(self, job: str, *arguments: object, **conf: str) -> subprocess.Popen[str]:
        """Start a job on the cluster as a user does; its output is piped."""
        settings = {"spark.executor.memory": "600m", **conf}
        options = [word for key, value in settings.items() for word in ("--conf", f"{key}={value}")]
        return subprocess.Popen(
            [
                str(Path(sys.executable).with_name("spark-submit")),
                *("--master", self.url),
                *options,
                str(ROOT / "jobs" / job),
                *("--profile", str(ROOT / "conf" / "profiles" / "cluster.yaml")),
                *map(str, arguments),
            ],
            cwd=self.folder,
            env=os.environ
            | {
                "PYSPARK_PYTHON": str(self.python),
                "PYSPARK_DRIVER_PYTHON": sys.executable,
                "SPARK_CONF_DIR": str(ROOT / "conf"),
                "SPARK_LOCAL_IP": "127.0.0.1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _alive(self) -> int:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self._ports[1]}/json/", timeout=2
            ) as page:
                return page.read().decode().count('"ALIVE"') - 1
        except OSError:
            return 0

    def _start(self, name: str, what: str, *arguments: object) -> subprocess.Popen[bytes]:
        home = self.folder / name
        home.mkdir(exist_ok=True)
        with open(home / "log", "ab") as log:
            return subprocess.Popen(
                [SPARK_HOME / "bin" / "spark-class", f"org.apache.spark.deploy.{what}"]
                + [str(argument) for argument in arguments],
                cwd=home,
                env=os.environ
                | {
                    "SPARK_HOME": str(SPARK_HOME),
                    "SPARK_LOCAL_IP": "127.0.0.1",
                    "SPARK_DAEMON_MEMORY": "256m",
                    "SPARK_CONF_DIR": str(home),
                },
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def shared_secret(path: Path) -> Path:
    """Write the settings that master, workers and driver of a secure cluster share, for the owner.

    Between the three of them nothing but what is here is known before the job's profile is read.
    """
    path.touch(0o600)
    settings = {
        "spark.authenticate": "true",
        "spark.authenticate.secret": secrets.token_hex(32),
        "spark.network.crypto.enabled": "true",
        "spark.network.crypto.cipher": "AES/GCM/NoPadding",
        "spark.network.crypto.authEngineVersion": "2",
        "spark.network.crypto.saslFallback": "false",
    }
    path.write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    return path


def python_without_medspark(folder: Path) -> Path:
    """Return an interpreter that has this environment's libraries, but not medspark.

    Its site-packages name ours in a .pth file, and what .pth files of ours name, such as an
    editable installation, is not followed from there.
    """
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder / "bin" / "python"


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
