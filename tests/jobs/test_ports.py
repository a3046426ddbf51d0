"""While medspark works, no process of it can be reached from another machine."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from medspark.images.phantom import PhantomConfig, write_archive

pytestmark = [pytest.mark.slow, pytest.mark.spark, pytest.mark.ddp]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TINY = (
    *("--demo.count", 40, "--demo.image_size", 32, "--model.name", "mobilenetv2_050"),
    *("--train.epochs", 1, "--evaluate.steps", 1, "--evaluate.sanity_images", 0),
    *("--launch.processes", 2, "--train.batch_size", 8),
)


@dataclass
class Seen:
    """Which processes listened, where others reach them and where nobody does."""

    outside: set[str] = field(default_factory=set)
    loopback: set[str] = field(default_factory=set)

    def look(self) -> None:
        """Note what listens now below this process."""
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                said = f"{process.name()} {' '.join(process.cmdline())[-120:]}"
                for found in process.net_connections("tcp"):
                    if found.status == psutil.CONN_LISTEN:
                        kept = self.loopback if _is_loopback(found.laddr.ip) else self.outside
                        kept.add(f"{found.laddr.ip}:{found.laddr.port} {said}")


def _is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    mapped = getattr(ip, "ipv4_mapped", None)  # how Java binds IPv4 addresses
    return (mapped or ip).is_loopback


@contextmanager
def watched() -> Iterator[Seen]:
    """Look all the time until the end."""
    seen, over = Seen(), threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            seen.look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def _environment(folder: Path) -> dict[str, str]:
    own = {"SPARK_CONF_DIR": str(ROOT / "conf"), "PATH": f"{BIN}:{os.environ['PATH']}"}
    kept = {key: value for key, value in os.environ.items() if key != "SPARK_LOCAL_IP"}
    return kept | own | {"HOME": str(folder)}


def _run(folder: Path, *command: object) -> None:
    words = list(map(str, command))
    done = subprocess.run(
        words, cwd=folder, env=_environment(folder), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ports")


def test_a_training_with_two_ranks_and_its_ingest_listen_on_loopback_alone(folder: Path) -> None:
    with watched() as seen:
        job = (ROOT / "jobs" / "train_at.py", *TINY, "--output", "r.json")
        _run(folder, BIN / "spark-submit", *job)

    assert seen.outside == set()
    assert any("train.py" in who for who in seen.loopback)  # gloo's: the ranks were looked at
    assert any(" java " in who for who in seen.loopback)


def test_an_ingest_started_without_spark_submit_listens_on_loopback_alone(folder: Path) -> None:
    key = write_archive(folder / "in", PhantomConfig(count=20, size=32))

    with watched() as seen:
        _run(
            folder, sys.executable, ROOT / "jobs" / "ingest.py", "--source", key.folder,
            "--labels", key.labels, "--samples", folder / "samples",
        )  # fmt: skip

    assert seen.outside == set()
    assert seen.loopback != set()


def test_an_evaluation_listens_on_loopback_alone(folder: Path) -> None:
    (shards,) = folder.glob("build/demo/*/shards")

    with watched() as seen:
        _run(
            folder, BIN / "spark-submit", ROOT / "jobs" / "evaluate.py", "--shards", shards,
            "--model", "r.run/model", "--attacks", "fgsm", "--eps", "2/255", "--gallery", 0,
            "--folder", "evaluation",
        )  # fmt: skip

    assert seen.outside == set()
    assert seen.loopback != set()


def test_a_federation_listens_on_loopback_alone(folder: Path) -> None:
    (shards,) = folder.glob("build/demo/*/shards")

    with watched() as seen:
        _run(
            folder, BIN / "spark-submit", ROOT / "jobs" / "federate.py", "--shards", shards,
            "--model.name", "test_resnet", "--clients.by", "dirichlet", "--clients.count", 2,
            "--rounds", 1, "--validate_rounds.every", 0, "--evaluate.attacks", "fgsm",
            "--evaluate.sanity_images", 0, "--output", "federation.json",
        )  # fmt: skip

    assert seen.outside == set()
    assert seen.loopback != set()


def test_a_served_model_listens_on_loopback_alone(folder: Path) -> None:
    reference = json.loads((folder / "r.json").read_text())["mlflow"]
    server = subprocess.Popen(
        [BIN / "mlflow", "models", "serve", "-m", reference["model"], "--env-manager", "local",
         "-p", str(_free_port())],
        env=_environment(folder) | {"MLFLOW_TRACKING_URI": reference["uri"]}, cwd=folder,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        with watched() as seen:
            _wait_for(f"http://127.0.0.1:{server.args[-1]}/ping", server)
            time.sleep(0.5)
    finally:
        for process in [*psutil.Process(server.pid).children(recursive=True), server]:
            process.kill()
        server.wait()

    assert seen.outside == set()
    assert any(who.startswith(f"127.0.0.1:{server.args[-1]} ") for who in seen.loopback)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(page: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None, "the server ended"
        with suppress(OSError), urllib.request.urlopen(page, timeout=5):
            return
        time.sleep(0.2)
    raise TimeoutError(page)
