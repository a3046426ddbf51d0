"""Measure the latency of an exported model for one image, and its peak memory; no torch.

    python -m medspark.export.latency MODEL_FOLDER [--threads 1] [--images 200]

Prints one JSON object. Each measurement is a new process, so that the peak memory is the model's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medspark.config import Config
from medspark.errors import RunError, UsageError
from medspark.export.runtime import DeployedModel
from medspark.models.prediction import Floats

__all__ = ["Measured", "measure", "measured_by"]

_WARM_UP = 10


class Measured(Config):
    """The time of one image in milliseconds, and the peak memory of the process in bytes."""

    threads: int
    median: float
    p99: float
    peak_bytes: int


def measured_by(run: Callable[[Floats], Any], image: Floats, *, images: int) -> list[float]:
    """Return the seconds of ``run`` on ``image`` for each of ``images`` times."""
    seconds = []
    for turn in range(_WARM_UP + images):
        began = time.perf_counter()
        run(image)
        if turn >= _WARM_UP:
            seconds.append(time.perf_counter() - began)
    return seconds


def measure(folder: Path, *, threads: int, images: int) -> Measured:
    """Measure the model in ``folder`` in a new process. Raises RunError if that fails."""
    command = [
        sys.executable, "-m", __name__, str(folder), "--threads", str(threads), "--images",
        str(images),
    ]  # fmt: skip
    paths = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    # The thread pool of another library would compete with the threads of the graph.
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RunError(f"The model in {folder} could not be measured: {done.stderr.strip()[-300:]}")
    return Measured.model_validate_json(done.stdout)


def _measure_here(folder: Path, threads: int, images: int) -> Measured:
    model = DeployedModel.load(folder, threads=threads)
    card = model.card
    shape = (1, card.channels, card.height, card.width)
    image = np.random.default_rng(0).random(shape, dtype=np.float32)
    milliseconds = 1000 * np.array(measured_by(model.logits, image, images=images))
    return Measured(
        threads=threads,
        median=float(np.median(milliseconds)),
        p99=float(np.percentile(milliseconds, 99)),
        peak_bytes=_peak_bytes(),
    )


def _peak_bytes() -> int:
    """Return the peak memory of this process in bytes, without that of its parent."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage includes the parent's memory before exec
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii"))
        if found:
            return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # others count kibibytes


def main(argv: Sequence[str]) -> int:
    """Print the measurement; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m medspark.export.latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="MODEL_FOLDER", help="an exported model")
    parser.add_argument("--threads", type=int, default=1, help="threads of the graph (1)")
    parser.add_argument("--images", type=int, default=200, help="number of timed images (200)")
    asked = parser.parse_args(argv)
    try:
        found = _measure_here(asked.model, asked.threads, asked.images)
    except UsageError as error:
        print(f"latency: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found.model_dump()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
