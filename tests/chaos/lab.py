"""The laboratory of the fault matrix: a standalone cluster, a small training, its outcome."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))
sys.path.insert(0, str(Path(__file__).parents[1] / "shards"))
from array_shards import write_arrays
from mlflow.tracking import MlflowClient
from standalone import StandaloneCluster

from medspark.launch.ranks.reports import Reports, Started
from medspark.track.journal import JournalReader, Record

ROWS, EPOCHS, BATCH, EVERY = 320, 4, 32, 5
STEPS = EPOCHS * ROWS // BATCH
RECIPE = (
    *("--model.name", "mobilenetv2_050", "--train.batch_norm", "frozen", "--train.log_every", 1),
    *("--train.epochs", EPOCHS, "--train.batch_size", BATCH, "--train.precision", "fp32"),
    *("--train.validation_steps", 1, "--evaluate.steps", 1, "--evaluate.sanity_images", 0),
    *("--checkpoint.every_steps", EVERY, "--track.system_metrics", "false"),
    *("--launch.timeout_seconds", 20, "--launch.threads_per_process", 1),
)


@dataclass
class Verdict:
    """The outcome of a row: its figures and its problems."""

    row: str
    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def expect(self, truth: bool, problem: str) -> None:
        """Note ``problem`` unless ``truth``."""
        if not truth:
            self.problems.append(problem)

    def limit(self, name: str, value: float, most: float) -> None:
        """Note a figure, and a problem if it is above ``most``."""
        self.figures[name] = round(value, 1)
        self.expect(value <= most, f"{name} is {value:.1f}, above {most}")


class Run:
    """One training on the cluster, or the resumption of one."""

    def __init__(self, lab: Lab, name: str, *options: object, folder: Path | None = None) -> None:
        self.lab = lab
        self.folder = folder or lab.folder / name
        self.folder.mkdir(exist_ok=True)
        self.run_dir = self.folder / "run"
        if not (self.folder / "mlflow.db").exists():
            shutil.copy(lab.database, self.folder / "mlflow.db")
        self.began = time.monotonic()
        self.process = lab.cluster.submit(
            *("train_at.py", "--shards", lab.shards, "--run_dir", self.run_dir, *RECIPE),
            *("--output", self.folder / "result.json"),
            *("--track.uri", f"sqlite:///{self.folder}/mlflow.db", *options),
        )
        lab.running.append(self.process)

    def records(self) -> list[Record]:
        """Return the records of the journal, with repeated steps."""
        return [r for r in JournalReader(self.run_dir / "journal").poll() if "loss" in r.metrics]

    def wait_for(self, truth: Callable[[], bool], what: str, *, seconds: float = 400) -> None:
        """Wait until ``truth`` holds. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while not truth():
            if self.process.poll() is not None:
                raise RuntimeError(f"the job ended before {what}: {self.process.stderr.read()}")
            if time.monotonic() > deadline:
                raise TimeoutError(what)
            time.sleep(0.002)

    def wait_for_step(self, step: int, *, attempt: int = 1) -> None:
        """Wait until ``attempt`` has reported ``step``."""
        self.wait_for(
            lambda: (
                self.attempt >= attempt
                and any(record.step >= step for record in self._records_of(attempt))
            ),
            f"step {step} of attempt {attempt}",
        )

    def _records_of(self, attempt: int) -> list[Record]:
        started = self.started(0, attempt)
        if started is None:
            return []
        return [r for r in self.records() if r.time_ms >= 1000 * started.time]

    @property
    def attempt(self) -> int:
        """The number of the newest attempt; 0 before the first."""
        attempts = self.run_dir / "attempts"
        return max((int(p.name) for p in attempts.iterdir()), default=0) if attempts.exists() else 0

    def started(self, rank: int, attempt: int | None = None) -> Started | None:
        """Return the first report of a rank of the newest attempt, or of ``attempt``."""
        number = attempt or self.attempt
        return Reports(self.run_dir / "attempts" / f"{number:04d}").started().get(rank)

    def rank(self, rank: int) -> Started:
        """Return the first report of a rank of the newest attempt."""
        started = self.started(rank)
        assert started is not None, f"rank {rank} has not begun"
        return started

    def above(self, rank: int, part: str) -> psutil.Process:
        """Return the nearest process above a rank whose command line contains ``part``."""
        for process in psutil.Process(self.rank(rank).sentinel).parents():
            if part in " ".join(process.cmdline()):
                return process
        raise RuntimeError(f"there is no {part} above rank {rank}")

    def finish(self, *, seconds: float = 600) -> int:
        """Wait for the end of the job and return its status."""
        # spark-submit joins both outputs of Python into one.
        self.errors = "".join(self.process.communicate(timeout=seconds)[::-1])
        self.seconds = time.monotonic() - self.began
        (self.folder / "output.log").write_text(self.errors)
        return self.process.returncode

    @property
    def result(self) -> dict[str, Any]:
        """The result document."""
        return dict(json.loads((self.folder / "result.json").read_text()))

    def weights(self) -> str:
        """Return the SHA-256 of the final weights."""
        path = self.run_dir / "model" / "model.safetensors"
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def recovery_seconds(self, since_ms: float) -> float:
        """Return the time from ``since_ms`` to the first step of the restarted ranks.

        Where no step was left for them it is when they began.
        """
        began = 1000 * self.rank(0).time
        after = [r.time_ms for r in self.records() if r.time_ms >= began]
        return (min(after, default=began) - since_ms) / 1000


class Lab:
    """The cluster, the shards, and the undisturbed run to compare with."""

    cluster: StandaloneCluster

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = make_shards(folder / "shards")
        # Made once: the migrations of a fresh database take longer than a small training.
        self.database = folder / "empty.db"
        MlflowClient(f"sqlite:///{self.database}").search_experiments()
        self.running: list[subprocess.Popen[str]] = []
        self._unbroken: Run | None = None

    def prepare(self) -> None:
        """Do the undisturbed run, if it has not been done yet."""
        if self._unbroken is None:
            run = Run(self, "unbroken", "--launch.processes", 2)
            if run.finish() != 0:
                raise RuntimeError(f"the unbroken run failed: {run.errors[-600:]}")
            self._unbroken = run

    @property
    def unbroken(self) -> Run:
        """The undisturbed run."""
        assert self._unbroken is not None, "prepare comes first"
        return self._unbroken

    def end_jobs(self) -> None:
        """End the processes that a failed row left running."""
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.running = []

    def judge(self, run: Run, verdict: Verdict, *, redone: int, exact: bool = True) -> Verdict:
        """Note all differences from the undisturbed run; ``redone`` steps may be repeated."""
        status = run.finish()
        verdict.expect(status == 0, f"status {status}: {run.errors[-600:]}")
        if status != 0:
            return verdict
        if exact:
            verdict.expect(run.weights() == self.unbroken.weights(), "the weights differ")
        verdict.figures["bit-equal"] = run.weights() == self.unbroken.weights()
        self._judge_samples(run, verdict, exact=exact)
        verdict.limit("steps done again", len(run.records()) - STEPS, redone)
        left = leftovers()
        verdict.expect(not left, f"processes left over: {left}")
        return verdict

    def _judge_samples(self, run: Run, verdict: Verdict, *, exact: bool) -> None:
        client = MlflowClient(run.result["mlflow"]["uri"])
        (experiment,) = [e for e in client.search_experiments() if e.name == "medspark"]
        runs = client.search_runs([experiment.experiment_id])
        verdict.expect(len(runs) == 1, f"{len(runs)} MLflow runs instead of one")
        verdict.expect(runs[0].info.status == "FINISHED", f"MLflow says {runs[0].info.status}")
        history = client.get_metric_history(runs[0].info.run_id, "loss")
        losses = {metric.step: metric.value for metric in history}
        verdict.expect(len(history) == len(losses) == STEPS, f"{len(history)} losses in MLflow")
        # The loss of a step is a function of the weights and of the samples that were seen. Where
        # ranks add up in another order, rounding grows from step to step.
        expected = {r.step: r.metrics["loss"] for r in self.unbroken.records()}
        close = all(
            np.isclose(losses.get(step, np.nan), loss, rtol=_tolerance(step, exact=exact), atol=0)
            for step, loss in expected.items()
        )
        verdict.expect(close, "the losses differ: other samples were seen")


def _tolerance(step: int, *, exact: bool) -> float:
    if exact:
        return 0.0
    return 1e-4 if step <= EVERY else 0.25


def make_shards(folder: Path, *, rows_per_group: int = 64, shards: int = 2) -> Path:
    """Write random images, 32 x 32, in ``shards`` files per split, and return the folder."""
    if (folder / "manifest.json").exists():
        return folder
    splits = {
        name: _images(name, rows) for name, rows in (("train", ROWS), ("val", 32), ("test", 32))
    }
    return write_arrays(folder, splits, shards=shards, rows_per_group=rows_per_group)


def _images(split: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(rows) % 2
    generator = np.random.default_rng(len(split))
    images = generator.integers(0, 200, (rows, 32, 32, 1)).astype(np.uint8)
    images[labels == 1, 8:24, 8:24] += 50
    return images, labels


def leftovers(*, seconds: float = 10) -> list[str]:
    """Return the ranks and their starters that still run after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        found = [
            f"{process.pid} {process.info['cmdline'][:4]}"
            for process in psutil.process_iter(["cmdline", "environ"])
            if process.info["cmdline"]
            and "MEDSPARK_CHAOS" in (process.info["environ"] or {})
            and any(
                word.endswith(("train.py", "torch_run_process_wrapper", "torch.distributed.run"))
                for word in process.info["cmdline"]
            )
        ]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.3)


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> float:
    """Send a signal and return the time, in milliseconds since 1970."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
    return time.time() * 1000


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a tracking server on ``port``; it keeps its database in ``folder`` across restarts."""
    with open(folder / "server.log", "ab") as log:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--port", str(port)),
                *("--backend-store-uri", f"sqlite:///{folder}/server.db", "--workers", "1"),
                *("--artifacts-destination", f"{folder}/artifacts"),
            ],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        client = MlflowClient(f"http://127.0.0.1:{port}")
        for _ in range(120):
            with suppress(Exception):
                client.search_experiments()
                break
            time.sleep(0.5)
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
