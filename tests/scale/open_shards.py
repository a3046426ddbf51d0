"""Open shards and plan an epoch as a rank of a training does; print seconds and memory as JSON.

python tests/scale/open_shards.py SHARDS
"""

from __future__ import annotations

import json
import resource
import sys
import time
from itertools import islice
from pathlib import Path

from medspark.data.config import DataConfig
from medspark.data.source import open_source


def main(shards: Path) -> None:
    """Open, plan, and read no image."""
    before, cpu = _megabytes(), time.process_time()
    began = time.perf_counter()
    source = open_source(shards, DataConfig(verify="size"))
    opened = time.perf_counter()
    splits = {name: source.split(name) for name in ("train", "val", "test")}
    rows = {name: len(split) for name, split in splits.items()}
    mapped = time.perf_counter()
    reader = source.training(global_batch=512, seed=0, rank=0, world=2)
    planned = reader.plan(0)  # type: ignore[attr-defined]  # of the native reader
    first = list(islice(planned.rank_batches(0, 2), 8))
    done = time.perf_counter()
    said = {
        "rows": sum(rows.values()), "open_seconds": done - began, "checked_seconds": opened - began,
        "mapped_seconds": mapped - opened, "planned_seconds": done - mapped,
        "cpu_seconds": time.process_time() - cpu, "steps": planned.steps,
        "first_rows": sum(map(len, first)),
        "rank_mb": _megabytes(), "rank_mb_before": before,
    }  # fmt: skip
    print(json.dumps(said))


def _megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main(Path(sys.argv[1]))
