"""Memory of the driver over the number of clients: 10,000 of them against 1,000, in whole jobs.

Each side is a job of its own, with logistic regression on 28 x 28 images, clients of 60 images, 100
of them in each of 20 rounds; its peak is the largest resident memory that the kernel saw of the
driver's Python process. The JVM beside it is logged, and is no part of the ratio: its heap grows up
to its limit, whatever the job.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import array_shards
import numpy as np
from federation import CLASSES, SETTINGS
from federation_rounds import PLACES, new_worker
from timing import Result

PER_ROUND, ROUNDS = 100, 20
HELD_OUT = 500
TURNS = int(os.environ.get("MEDSPARK_BENCH_TURNS", "3"))
_LOGGER = logging.getLogger(__name__)


def write(folder: Path, clients: int) -> Path:
    """Write the images of so many clients, and some to validate and to test."""
    setting, draw = SETTINGS["lr"], np.random.default_rng(0)

    def images(count: int) -> Any:
        pixels = draw.integers(0, 256, (count, setting.side, setting.side, 1), dtype=np.uint8)
        return pixels, np.arange(count) % CLASSES

    counts = {"train": clients * setting.images, "val": HELD_OUT, "test": HELD_OUT}
    return array_shards.write_arrays(folder, {name: images(n) for name, n in counts.items()})


def run(shards: Path, place: Path, clients: int) -> dict[str, float]:
    """Run the job on ``shards`` and return the peaks of this process and of its JVM, in MB."""
    from medspark.workflows import federation
    from medspark.workflows.federate import federate
    from medspark.workflows.federate_config import FederateConfig

    # Workers that are sent this function know the network, which timm does not.
    federation.Worker = lambda setting, **_: new_worker(setting)  # type: ignore[misc, assignment]
    settings = {
        "shards": shards,
        "output": place / "result.json",
        "clients": {"by": "patient", "count": clients, "per_round": PER_ROUND},
        "rounds": ROUNDS,
        "model": {"name": "bench_lr"},
        "augment": {"flip": 0},
        "validate_rounds": {"every": 10},
        "evaluate": {"attacks": ["fgsm"], "sanity_images": 0},
        "track": {"uri": f"sqlite:///{place / 'mlflow.db'}", "log_model": False},
    }
    config = FederateConfig.model_validate(settings | SETTINGS["lr"].local().model_dump())
    result = federate(config)
    assert len(result.rounds) == ROUNDS
    assert all(len(each.clients) == PER_ROUND for each in result.rounds)
    return {"python": peak("self"), "jvm": max(map(peak, children()), default=0.0)}


def children() -> list[str]:
    """Return the numbers of the processes that this one started."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def peak(process: str) -> float:
    """Return the largest resident memory of a process so far, in MB."""
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return 0.0 if found is None else int(found[1]) / 1024


def measured(clients: int) -> dict[str, float]:
    """Return the peaks of a job with so many clients, run by a process of its own."""
    told = subprocess.run(
        [sys.executable, __file__, str(clients)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, PLACES))},
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    found: dict[str, float] = json.loads(told.splitlines()[-1])
    return found


def growth() -> Result:
    """Return the driver's peak with 10,000 clients over that with 1,000."""
    samples = []
    for turn in range(TURNS):
        sizes = (10_000, 1_000) if turn % 2 == 0 else (1_000, 10_000)
        peaks = {clients: measured(clients) for clients in sizes}
        _LOGGER.info("peaks by clients, MB: %s", peaks)
        samples.append(peaks[10_000]["python"] / peaks[1_000]["python"])
    return Result(tuple(samples), 1.05, higher_is_better=False)


BENCHMARKS: dict[str, Callable[[], Result]] = {"federation_memory": growth}


def main() -> int:
    """Write shards in a process that ends, run a job on them, and print its peaks."""
    clients = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        made = f"from federation_memory import *; write(Path({str(place / 'shards')!r}), {clients})"
        subprocess.run([sys.executable, "-c", made], check=True)
        print(json.dumps(run(place / "shards", place, clients)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
