"""What Spark and a second process cost: the same training under other launchers, by turns.

Every side is a training by processes of its own, with one thread a rank. What is compared is the
speed of its steps, as its journal tells it: start-up, first steps, validation and test are apart.

``executors_vs_torchrun`` submits jobs/train_at.py to a cluster on this machine, whose tasks the two
ranks are, and has torchrun start the same two ranks, with nothing of Spark about.
``weak_scaling_2`` holds two ranks against one with as many images each. It also prints what bounds
it: the speed of two trainings side by side that know nothing of each other, which lose to each
other what cores of one machine share, and the share of a step in which ranks wait for gradients.
``startup_seconds`` is what a user waits longer for the first step after spark-submit than after
torchrun: seconds, and no ratio.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
from array_shards import write_arrays
from loader import folder, pixels
from mlflow.tracking import MlflowClient
from standalone import StandaloneCluster
from timing import Result

from medspark.study.laws import Window, efficiency, steady
from medspark.track.journal import JournalReader

RANK_BATCH, STEPS, WARM_UP = 32, 48, 8
TURNS = int(os.environ.get("MEDSPARK_BENCH_TURNS", "5"))
RECIPE = (
    *("--train.batch_norm", "frozen", "--train.log_every", 4, "--train.monitor.action", "off"),
    *("--train.validation_images", 8, "--train.validation_steps", 1),
    *("--evaluate.attacks", "fgsm", "--evaluate.images", 8, "--evaluate.sanity_images", 0),
)
JOBS = Path(__file__).parents[2] / "jobs"
_LOGGER = logging.getLogger(__name__)


@cache
def shards() -> Path:
    """Return shards with as many images as one rank takes."""
    rows, few = RANK_BATCH * STEPS, 32
    train, held_out = (pixels()[:n] for n in (rows, few))
    labels = np.arange(rows) % 2
    splits = {"val": (held_out, labels[:few]), "test": (held_out, labels[:few])}
    return write_arrays(folder() / "scale", {"train": (train, labels), **splits})


def options(network: str, ranks: int, place: Path) -> list[str]:
    """Return what every training is told; each has as many steps."""
    given = (
        *("--shards", shards(), "--run_dir", place / "run", "--model.name", network),
        *("--train.epochs", ranks, "--train.batch_size", ranks * RANK_BATCH, *RECIPE),
    )
    return [str(word) for word in given]


def speed(place: Path) -> float:
    """Return the images per second of a training in ``place`` that is over."""
    windows = [
        Window(record.step, record.metrics["images_per_second"], 0.0)
        for record in JournalReader(place / "run" / "journal").poll()
        if "images_per_second" in record.metrics
    ]
    found = steady(windows, warmup_steps=WARM_UP)
    assert found is not None, f"nothing was trained in {place}"
    return found.images_per_second


def torchrun(network: str, ranks: int, place: Path) -> subprocess.Popen[str]:
    """Start ``ranks`` without Spark."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(ranks), "-m", "medspark.train"),
            *options(network, ranks, place),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def bare(network: str, ranks: int, *, trainings: int = 1) -> tuple[float, float]:
    """Return the images per second of ``trainings`` at once, and the share that ranks wait."""
    with tempfile.TemporaryDirectory(prefix="medspark-bench-") as scratch:
        places = [Path(scratch, str(number)) for number in range(trainings)]
        _finish([torchrun(network, ranks, place) for place in places])
        results = [json.loads((place / "run" / "result.json").read_text()) for place in places]
        waits = statistics.fmean(result["communication_share"] for result in results)
        return sum(map(speed, places)), waits


def on_executors(network: str, ranks: int) -> float:
    """Return the images per second of the job on a cluster, which is there for it alone."""
    with tempfile.TemporaryDirectory(prefix="medspark-bench-") as scratch:
        place = Path(scratch)
        with StandaloneCluster(place / "cluster", workers=ranks) as cluster:
            job = cluster.submit(
                *("train_at.py", *options(network, ranks, place), "--launch.processes", ranks),
                *("--launch.threads_per_process", 1, "--output", place / "result.json"),
                *("--track.uri", f"sqlite:///{place}/mlflow.db", "--track.log_model", "false"),
            )
            _finish([job])
        return speed(place)


def startup_seconds(network: str = "mobilenetv2_100") -> Result:
    """Return how many seconds later the first step ends under spark-submit than under torchrun."""

    def bare_start(place: Path) -> subprocess.Popen[str]:
        return torchrun(network, 2, place)

    sides = (partial(first_step, job_here(network, 2)), partial(first_step, bare_start))
    return Result(
        tuple(ours - theirs for ours, theirs in _by_turns(sides, unit="seconds")),
        goal=10,
        higher_is_better=False,
    )


@cache
def store() -> str:
    """Return an MLflow store that is there already, as from the second run on."""
    uri = f"sqlite:///{folder()}/mlflow.db"
    MlflowClient(uri).search_experiments()
    return uri


def job_here(network: str, ranks: int) -> Callable[[Path], subprocess.Popen[str]]:
    """Return what submits the job to Spark on this machine, without a cluster."""

    def submit(place: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                *(str(Path(sys.executable).with_name("spark-submit")), str(JOBS / "train_at.py")),
                *("--profile", str(JOBS.parent / "conf/profiles/local.yaml")),
                *options(network, ranks, place),
                *("--launch.processes", str(ranks), "--launch.threads_per_process", "1"),
                *("--output", str(place / "result.json"), "--track.log_model", "false"),
                *("--track.uri", store()),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return submit


def first_step(start: Callable[[Path], subprocess.Popen[str]]) -> float:
    """Return the seconds from ``start`` until rank 0 had done its first step."""
    with tempfile.TemporaryDirectory(prefix="medspark-bench-") as scratch:
        place = Path(scratch)
        began = time.time()
        _finish([start(place)])
        written = next(place.glob("result.json"), place / "run" / "result.json")
        return float(json.loads(written.read_text())["timeline"]["stepped"] - began)


def _finish(processes: Sequence[subprocess.Popen[str]]) -> None:
    said = ["".join(filter(None, process.communicate())) for process in processes]
    for process, text in zip(processes, said, strict=True):
        if process.returncode != 0:
            raise RuntimeError(f"a training ended with {process.returncode}: {text[-2000:]}")


def executors_vs_torchrun(network: str = "mobilenetv2_100") -> Result:
    """Return the time of a step on executors over that under torchrun."""
    sides = (lambda: on_executors(network, 2), lambda: bare(network, 2)[0])
    ratios = [theirs / ours for ours, theirs in _by_turns(sides)]
    return Result(tuple(ratios), goal=1.03, higher_is_better=False)


def weak_scaling(network: str) -> Result:
    """Return the speed of each of two ranks over that of one."""
    waits: list[float] = []

    def together() -> float:
        found, wait = bare(network, 2)
        waits.append(wait)
        return found

    sides = (
        lambda: bare(network, 1)[0],
        together,
        lambda: bare(network, 1, trainings=2)[0],
    )
    found = _by_turns(sides)
    apart = statistics.median(efficiency(speed, 2, alone) for alone, _, speed in found)
    _LOGGER.info("two trainings side by side: %.3f of the speed of one", apart)
    _LOGGER.info("waiting for gradients: %.3f of a step", statistics.median(waits))
    ratios = [efficiency(speed, 2, alone) for alone, speed, _ in found]
    return Result(tuple(ratios), goal=0.92, higher_is_better=True)


def _by_turns(
    sides: Sequence[Callable[[], float]], *, unit: str = "images per second"
) -> list[tuple[float, ...]]:
    """Return what each of ``sides`` found in each turn; which goes first alternates."""
    turns = []
    for turn in range(TURNS):
        order = list(range(len(sides)))[:: 1 if turn % 2 == 0 else -1]
        found = {number: sides[number]() for number in order}
        turns.append(tuple(found[number] for number in range(len(sides))))
        _LOGGER.info("%s: %s", unit, ", ".join(f"{s:.1f}" for s in turns[-1]))
    return turns


BENCHMARKS: dict[str, Callable[[], Result]] = {
    "executors_vs_torchrun": executors_vs_torchrun,
    "startup_seconds": startup_seconds,
    "weak_scaling_2/mobilenetv2_100": partial(weak_scaling, "mobilenetv2_100"),
    "weak_scaling_2/resnet50": partial(weak_scaling, "resnet50"),
}
