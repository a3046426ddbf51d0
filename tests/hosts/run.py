"""Work across hosts, cut one off, and listen in: three hosts in network namespaces of their own.

    python tests/hosts/run.py [--only whole,cut,lost,secret,clear,stays] [--output build/hosts.json]

whole: ranks on two hosts talk over the bridge. cut: one host's link is cut for 20 s; the run ends
well. lost: it stays cut; the run ends with a clear error within its time-outs. All of them with
conf/profiles/secure.yaml. secret: an ingest with it, of which every frame is written down: nobody
reads a piece of the pseudonym key in them. clear: without it the key can be read, so that who finds
nothing is known to look. stays: without it, but with the key on the executors, there is nothing to
be read. Needs root and about seven minutes on two cores; where namespaces are not allowed it says
so and ends with 0.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))
sys.path.insert(0, str(Path(__file__).parents[1] / "chaos"))
sys.path.insert(0, str(Path(__file__).parent))
from lab import RECIPE, STEPS, Verdict, make_shards
from network import Network, NotAllowed
from sniffer import said_aloud, streams
from standalone import ROOT, SPARK_HOME, python_without_medspark, shared_secret

from medspark.images.phantom import PhantomConfig, write_archive
from medspark.launch.ranks.reports import Reports
from medspark.track.journal import JournalReader

WORKERS = ("worker-1", "worker-2")
_CUT_SECONDS = 20
_CUT_AT_STEP = 8
# A rank gives up after 30 s, and Spark after 60 s a machine that does not answer.
_RANK_SECONDS = 30
_LOST_SECONDS = 180
_IMAGES = 60


class Cluster:
    """A Spark master and a worker on each of two hosts; the driver is on the master's."""

    def __init__(self, network: Network, folder: Path, *, secure: bool) -> None:
        self.network = network
        self.folder = folder
        self.secret = shared_secret(folder / "secret.conf") if secure else None
        self.python = python_without_medspark(folder / "python")
        self.url = f"spark://{network.address('master')}:7077"
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        self._daemon("master", "master.Master", "--port", 7077)
        for worker in WORKERS:
            work = ("--cores", 1, "--memory", "1g", "--work-dir", self.folder / worker / "work")
            self._daemon(worker, "worker.Worker", *work, self.url)
        log = self.folder / "master" / "log"
        _wait(lambda: log.read_text().count("Registering worker") >= len(WORKERS), seconds=60)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in reversed(self._processes):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def train(self, run: Path, *options: object) -> subprocess.Popen[str]:
        """Start a training in the folder ``run`` with a rank on each host."""
        return self.submit(
            run,
            *("train_at.py", "--shards", self.folder / "shards", *RECIPE, "--run_dir", run / "run"),
            *("--track.uri", f"sqlite:///{run}/mlflow.db", "--launch.processes", 2),
            *("--launch.timeout_seconds", _RANK_SECONDS, *options),
            # This network is ours: the ranks may talk in clear.
            *("--spark.settings.pytorch.spark.distributor.ignoreSsl", "true"),
        )

    def submit(self, run: Path, job: str, *options: object) -> subprocess.Popen[str]:
        """Start a job with its output and result in the folder ``run``."""
        conf = {
            "spark.executor.memory": "600m",
            "spark.driver.host": self.network.address("master"),
            "spark.driver.bindAddress": self.network.address("master"),
            # It leaves random bytes as they are: what is sent in clear can be found.
            "spark.io.compression.codec": "lz4",
        }
        settings = [word for key, value in conf.items() for word in ("--conf", f"{key}={value}")]
        profile = "secure" if self.secret else "cluster"
        with open(run / "output.log", "w", encoding="utf-8") as log:
            return self._start(
                "master",
                *(Path(sys.executable).with_name("spark-submit"), "--master", self.url, *settings),
                *(*self._properties(), ROOT / "jobs" / job),
                *("--profile", ROOT / "conf" / "profiles" / f"{profile}.yaml"),
                *("--output", run / "result.json", *options),
                output=log,
                SPARK_CONF_DIR=str(ROOT / "conf"),
                PYSPARK_PYTHON=str(self.python),
                PYSPARK_DRIVER_PYTHON=sys.executable,
            )

    def _daemon(self, host: str, what: str, *options: object) -> None:
        home = self.folder / host
        home.mkdir()
        with open(home / "log", "w", encoding="utf-8") as log:
            self._start(
                host,
                *(SPARK_HOME / "bin" / "spark-class", f"org.apache.spark.deploy.{what}"),
                *("--host", self.network.address(host), "--webui-port", 0),
                *(*self._properties(), *options),
                output=log,
                SPARK_CONF_DIR=str(home),
                SPARK_DAEMON_MEMORY="256m",
            )

    def _properties(self) -> tuple[object, ...]:
        return ("--properties-file", self.secret) if self.secret else ()

    def _start(
        self, host: str, *command: object, output: object, **environment: str
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            self.network.on(host, *command),
            cwd=self.folder,
            env=os.environ
            | {"SPARK_HOME": str(SPARK_HOME), "SPARK_LOCAL_IP": self.network.address(host)}
            | environment,
            stdout=output,  # type: ignore[call-overload]
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._processes.append(process)
        return process


def whole(cluster: Cluster) -> Verdict:
    """An undisturbed run: ranks on two hosts talk over the bridge, each at one address."""
    verdict, run = _begin(cluster, "whole")
    job = cluster.train(run)
    _wait(lambda: _steps(run) >= 1 or job.poll() is not None, seconds=180)
    for host in ("master", *WORKERS):
        everywhere = _listening_everywhere(cluster.network, host)
        verdict.expect(everywhere == [], f"{host} listens on all addresses: {everywhere}")
    status = job.wait(300)

    verdict.expect(status == 0, f"status {status}: {_said(run)}")
    started = Reports(run / "run" / "attempts" / "0001").started()
    interfaces = {report.interface for report in started.values()}
    verdict.expect(interfaces == {"eth0"}, f"the ranks talked over {interfaces}")
    used = [w for w in WORKERS if list((cluster.folder / w / "work").glob("app-*/*/stderr"))]
    verdict.expect(len(used) == 2, f"executors on {used} alone")
    verdict.expect(_steps(run) == STEPS, f"{_steps(run)} steps of {STEPS}")
    return verdict


def cut(cluster: Cluster) -> Verdict:
    """One host's link is cut for 20 s: the run waits, or starts again, and ends well."""
    verdict, run = _begin(cluster, "cut")
    job = cluster.train(run, "--launch.max_restarts", 2)
    _wait(lambda: _steps(run) >= _CUT_AT_STEP or job.poll() is not None, seconds=180)
    cluster.network.cut("worker-2")
    before = _steps(run)
    time.sleep(_CUT_SECONDS)
    during = _steps(run)
    cluster.network.mend("worker-2")
    mended = time.monotonic()
    status = job.wait(400)

    verdict.limit("seconds from mending to the end", time.monotonic() - mended, 240)
    verdict.expect(during - before <= 3, f"{during - before} steps were taken without a link")
    verdict.expect(status == 0, f"status {status}: {_said(run)}")
    verdict.expect(_steps(run) == STEPS, f"{_steps(run)} steps of {STEPS}")
    if status == 0:
        launched = json.loads((run / "result.json").read_text())["launch"]
        verdict.figures["restarts"] = launched["restarts"]
    return verdict


def lost(cluster: Cluster) -> Verdict:
    """One host's link stays cut: the run ends with a clear error within its time-outs."""
    verdict, run = _begin(cluster, "lost")
    job = cluster.train(run)
    _wait(lambda: _steps(run) >= _CUT_AT_STEP or job.poll() is not None, seconds=180)
    cluster.network.cut("worker-2")
    began = time.monotonic()
    try:
        status = job.wait(2 * _LOST_SECONDS)
    finally:
        cluster.network.mend("worker-2")

    verdict.limit("seconds to the error", time.monotonic() - began, _LOST_SECONDS)
    verdict.expect(status == 1, f"status {status}: {_said(run)}")
    told = [line for line in _said(run, 20_000).splitlines() if line.startswith("train_at failed:")]
    verdict.expect(len(told) == 1 and "rank " in told[0], f"no rank is named: {_said(run)}")
    verdict.figures["error"] = told[0] if told else ""
    return verdict


def secret(cluster: Cluster) -> Verdict:
    """With the secure profile no piece of the key is readable on the network."""
    verdict, heard = _overheard(cluster, "secret")
    verdict.expect(heard == [], f"the key was said aloud: {heard}")
    return verdict


def clear(cluster: Cluster) -> Verdict:
    """Without the profile the key is readable, which shows that the sniffer works."""
    verdict, heard = _overheard(cluster, "clear")
    verdict.expect(heard != [], "the sniffer did not find the key where it travels in clear")
    return verdict


def stays(cluster: Cluster) -> Verdict:
    """With a key file on the executors, the key is not on the network."""
    there = cluster.folder / "stays-there.key"
    verdict, heard = _overheard(cluster, "stays", "--privacy.executor_key_file", there, there=there)
    verdict.expect(heard == [], f"the key was said aloud: {heard}")
    return verdict


def _overheard(
    cluster: Cluster, name: str, *options: object, there: Path | None = None
) -> tuple[Verdict, list[tuple[str, str]]]:
    """Ingest across hosts while sniffing; return senders and receivers of pieces of the key."""
    verdict, run = _begin(cluster, name)
    archive = write_archive(run / "archive", PhantomConfig(count=_IMAGES, size=32))
    key = secrets.token_bytes(32)
    for path in [run / "key", *([there] if there else [])]:
        path.touch(0o600)
        path.write_text(key.hex(), encoding="ascii")
    with _listening(cluster.network, run / "frames"):
        status = cluster.submit(
            *(run, "ingest.py", "--source", archive.folder, "--labels", archive.labels),
            *("--samples", run / "samples", "--privacy.key_file", run / "key", *options),
        ).wait(300)

    verdict.expect(status == 0, f"status {status}: {_said(run)}")
    if status == 0:
        result = json.loads((run / "result.json").read_text())
        verdict.expect(result["samples"] == archive.images, f"{result['samples']} samples")
    sizes = [len(what) for _, what in streams(run / "frames")]
    verdict.figures |= {"streams": len(sizes), "MB": round(sum(sizes) / 1e6, 1)}
    return verdict, said_aloud(run / "frames", key)


def _listening_everywhere(network: Network, host: str) -> list[str]:
    """Return the sockets of a host that listen on all its addresses."""
    code = (
        "import psutil\n"
        "for c in psutil.net_connections('tcp'): print(c.laddr.ip, c.laddr.port, c.status)"
    )
    found = subprocess.run(
        network.on(host, sys.executable, "-c", code), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [line for line in found if line.startswith(("0.0.0.0 ", ":: ")) and "LISTEN" in line]


@contextmanager
def _listening(network: Network, capture: Path) -> Iterator[None]:
    """Record the frames of the switch. Raises RuntimeError if some are lost."""
    script = Path(__file__).with_name("sniffer.py")
    sniffer = subprocess.Popen(
        network.on("switch", sys.executable, script, capture), stdout=subprocess.PIPE, text=True
    )
    try:
        assert sniffer.stdout is not None
        if sniffer.stdout.readline() != "listening\n":
            raise RuntimeError("the sniffer did not start")
        yield
    finally:
        sniffer.terminate()
    if sniffer.wait(60) != 0:
        raise RuntimeError("the sniffer lost frames")


ROWS: dict[str, Callable[[Cluster], Verdict]] = {
    "whole": whole,
    "cut": cut,
    "lost": lost,
    "secret": secret,
    "clear": clear,
    "stays": stays,
}
_IN_CLEAR = ("clear", "stays")


def main(argv: list[str]) -> int:
    """Run the rows; return 0 if all pass, or if the machine cannot run them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows, separated by commas")
    parser.add_argument("--output", type=Path, default=Path("build/hosts.json"))
    chosen = parser.parse_args(argv)
    names = [name for name in chosen.only.split(",") if name] or list(ROWS)
    verdicts = []
    with ExitStack() as kept:
        folder = Path(kept.enter_context(tempfile.TemporaryDirectory(prefix="hosts-")))
        try:
            network = kept.enter_context(Network(["master", *WORKERS]))
        except NotAllowed as reason:
            print(f"skipped: {reason}")
            return 0
        make_shards(folder / "shards")
        for name in names:
            home = folder / f"cluster-{name}"
            home.mkdir()
            (home / "shards").symlink_to(folder / "shards")
            with Cluster(network, home, secure=name not in _IN_CLEAR) as cluster:
                verdicts.append(ROWS[name](cluster))
            _show(verdicts[-1])
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps([asdict(v) for v in verdicts], indent=1) + "\n")
    failed = sum(bool(verdict.problems) for verdict in verdicts)
    print(f"{len(verdicts) - failed} of {len(verdicts)} passed; {chosen.output}")
    return 1 if failed else 0


def _begin(cluster: Cluster, name: str) -> tuple[Verdict, Path]:
    run = cluster.folder / name
    run.mkdir()
    return Verdict(name), run


def _steps(run: Path) -> int:
    """Return the last step that rank 0 reported."""
    records = JournalReader(run / "run" / "journal").poll()
    return max((record.step for record in records if "loss" in record.metrics), default=0)


def _said(run: Path, length: int = 800) -> str:
    return (run / "output.log").read_text(errors="replace")[-length:]


def _wait(truth: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not truth():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened within {seconds} s")
        time.sleep(0.1)


def _show(verdict: Verdict) -> None:
    figures = ", ".join(f"{key} {value}" for key, value in verdict.figures.items())
    print(f"{verdict.row:8} {'FAILED' if verdict.problems else 'passed'}  {figures}", flush=True)
    for problem in verdict.problems:
        print(f"    {problem}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
