"""Rounds of a federation: ours on Spark, Flower's simulation, and a bare loop per core, by turns.

``federation_vs_flower`` needs an environment of Flower's own (tests/federate/flower_rounds.py says
which) and the path of its Python in FLOWER_PYTHON. ``federation_vs_limit`` holds our rounds against
one process per core that each runs the bare loop on its part of the clients. A round's time is the
median of a turn, without the first rounds, in which each side starts its processes and reads files.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from federation import SETTINGS, bare
from timing import Result, in_a_process
from torch import nn

from medspark.data.config import AugmentConfig
from medspark.federate.config import CohortConfig, FederationConfig
from medspark.federate.folder import FederationFolder
from medspark.federate.local import ClientPrecision
from medspark.federate.server import Server
from medspark.federate.setting import Setting
from medspark.federate.start import begin
from medspark.federate.stored import ClientRows
from medspark.federate.worker import Worker
from medspark.launch.standing import standing_tasks
from medspark.models.config import ModelConfig
from medspark.models.torchvision_ops import import_timm
from medspark.spark.cluster import available_cores
from medspark.spark.session import SparkConfig, spark_session
from medspark.train.learner import bf16_pays

CLIENTS = {"lr": 1000, "cnn": 100}
# Rounds that are timed in a turn, and those before them. In the first ones Spark's Java process
# still compiles, and later a file system writes files at times, so there are many.
ROUNDS, WARM_UP = 20, 4
TURNS = int(os.environ.get("MEDSPARK_BENCH_TURNS", "3"))
HERE = Path(__file__).parent
# What workers, Spark's and Ray's, import by name.
PLACES = (HERE.parents[1], HERE, HERE.parent / "shards", HERE.parent / "federate")
_LOGGER = logging.getLogger(__name__)


def _network(setting: str) -> nn.Module:
    model: Any = SETTINGS[setting].network()
    model.pretrained_cfg = {"mean": (0.0,), "std": (1.0,)}
    return model


def bench_lr(**_: Any) -> nn.Module:
    """Return the regression, as timm makes networks."""
    return _network("lr")


def bench_cnn(**_: Any) -> nn.Module:
    """Return the convolutional network, as timm makes networks."""
    return _network("cnn")


for _entry in (bench_lr, bench_cnn):
    import_timm().models.register_model(_entry)


def new_worker(setting: Setting) -> Worker:
    """Return a worker. A task that is sent this function imports the networks above."""
    return Worker(setting)


def ours(setting: str, per_round: int, precision: ClientPrecision) -> list[float]:
    """Return the seconds of our rounds on a local Spark."""
    each, clients = SETTINGS[setting], CLIENTS[setting]
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, PLACES))
    with tempfile.TemporaryDirectory() as place:
        shards = each.write(Path(place) / "shards", clients)
        config = FederationConfig(
            **each.local(precision).model_dump(),
            clients=CohortConfig(count=clients, per_round=per_round),
            rounds=WARM_UP + ROUNDS,
            model=ModelConfig(name=f"bench_{setting}"),
            augment=AugmentConfig(flip=0),
        )
        made = Setting(config, shards, FederationFolder(Path(place) / "federation"))
        begin(made.folder, config, shards, made.manifest)
        rows = ClientRows(made.folder.path / "clients.npz")
        cores = available_cores()
        with (
            spark_session(SparkConfig(master=f"local[{cores}]")) as spark,
            standing_tasks(spark, made.folder.path, partial(new_worker, made), tasks=cores) as crew,
        ):
            server = Server(made, crew, rows)
            return _timed(server.run)


def _timed(run: Callable[[int], object]) -> list[float]:
    seconds = []
    for number in range(WARM_UP + ROUNDS):
        began = time.perf_counter()
        run(number)
        seconds.append(time.perf_counter() - began)
    return seconds[WARM_UP:]


def flower(setting: str, per_round: int) -> list[float]:
    """Return the seconds of Flower's rounds."""
    numbers = CLIENTS[setting], per_round, WARM_UP + ROUNDS
    told = subprocess.run(
        [
            os.environ["FLOWER_PYTHON"],
            str(HERE.parent / "federate" / "flower_rounds.py"),
            setting,
            *map(str, numbers),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, PLACES))},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
    ).stdout
    found: list[float] = json.loads(told.splitlines()[-1])
    return found[WARM_UP:]


def limit(setting: str, per_round: int) -> list[float]:
    """Return the seconds of rounds by one bare loop per core, each with its part of the clients."""
    cores = available_cores()
    parts = [len(part) for part in np.array_split(np.arange(per_round), cores)]
    with ExitStack() as stack:
        loops = [stack.enter_context(in_a_process(partial(bare, setting, n))) for n in parts]
        waiting = stack.enter_context(ThreadPoolExecutor(cores))
        return _timed(lambda _: list(waiting.map(lambda loop: loop(), loops)))


SIDES = {"flower": flower, "limit": limit}


def compare(side: str, setting: str, per_round: int, goal: float) -> Result:
    """Return the time of the other ``side``'s rounds over that of ours, for each turn.

    Beside the limit ours compute in float32 as the bare loop does, since what Spark and the sum
    cost is asked. Beside Flower the network is in bf16 where that is faster, as a user may choose.
    """
    lower = (side, setting) == ("flower", "cnn") and bf16_pays(torch.device("cpu"))
    precision: ClientPrecision = "bf16" if lower else "fp32"
    sides = {"ours": partial(ours, precision=precision), side: SIDES[side]}
    samples = []
    for turn in range(TURNS):
        order = ("ours", side) if turn % 2 == 0 else (side, "ours")
        times = {name: statistics.median(sides[name](setting, per_round)) for name in order}
        _LOGGER.info("%s, %d a round: %s s", setting, per_round, times)
        samples.append(times[side] / times["ours"])
    return Result(tuple(samples), goal, higher_is_better=True)


BENCHMARKS: dict[str, Callable[[], Result]] = {
    "federation_vs_limit/cnn": partial(compare, "limit", "cnn", 10, 0.85),
}
if "FLOWER_PYTHON" in os.environ:
    BENCHMARKS |= {
        "federation_vs_flower/lr_10": partial(compare, "flower", "lr", 10, 10.0),
        "federation_vs_flower/lr_100": partial(compare, "flower", "lr", 100, 10.0),
        "federation_vs_flower/cnn": partial(compare, "flower", "cnn", 10, 2.5),
    }
