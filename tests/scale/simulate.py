"""Ten or a hundred million rows without pixels: opened and planned by a rank, and settled.

    python tests/scale/simulate.py --rows 1000000 --new 10000

Shards whose pixels are holes on disk are opened and planned in a process of its own. A ledger of as
many rows is settled with --new rows, as an ingest of that many new files settles it. A ledger takes
about 110 bytes a row on disk, and 5 microseconds a row to write. It is removed afterwards.

Reads   nothing
Writes  below --folder; a line of JSON for each measurement
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import memory_watch
import simulated_ledger
import simulated_shards
from pyspark.sql import DataFrame, SparkSession

from medspark.images.deidentify import Pseudonyms
from medspark.ingest.increment import Increment, Replaced
from medspark.ingest.sample_set import SampleSet, new_generation
from medspark.spark.cluster import default_parallelism
from medspark.spark.session import SparkConfig, spark_session
from medspark.spark.task import tasks_for

CORES = os.cpu_count() or 1


def opened(folder: Path, rows: int) -> dict[str, Any]:
    """Return what it takes a rank to open and plan shards of ``rows`` rows."""
    simulated_shards.write(folder / "shards", rows)
    files = sum(1 for _ in (folder / "shards" / "data").iterdir())
    command = [sys.executable, str(Path(__file__).with_name("open_shards.py"))]
    done = subprocess.run(
        [*command, str(folder / "shards")], capture_output=True, text=True, check=True
    )
    shutil.rmtree(folder / "shards")
    return {"what": "open", "shards": files, **json.loads(done.stdout.splitlines()[-1])}


def settled(folder: Path, rows: int, new: Sequence[int]) -> list[dict[str, Any]]:
    """Return what it takes to settle each number of ``new`` rows into a ledger of ``rows``."""
    place, began = folder / "samples", time.perf_counter()
    manifest = simulated_ledger.write(place, rows, processes=CORES)
    written = time.perf_counter() - began
    size = sum(path.stat().st_size for path in place.rglob("*.parquet"))
    found = []
    settings = {"spark.ui.showConsoleProgress": "false"}
    # So that Spark's workers find the modules beside this one.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    with spark_session(SparkConfig(master=f"local[{CORES}]", settings=settings)) as spark:
        for count in (min(new), *new):  # the first warms up
            generation = new_generation()
            increment = Increment(
                spark, SampleSet(str(place)), manifest, generation=generation,
                source_key=simulated_ledger.SOURCE, pseudonyms=Pseudonyms(bytes(32)),
                staged=partial(_staged, spark, place / "staging"),
            )  # fmt: skip
            touched, fresh = simulated_ledger.fresh(
                spark, rows, count, tasks=tasks_for(spark, count)
            )
            with memory_watch.watching(os.getpid()) as peaks:
                began, cpu = time.perf_counter(), _cpu_seconds()
                replaced = increment.settle(touched, fresh)
                seconds, cpu = time.perf_counter() - began, _cpu_seconds() - cpu
            assert replaced is not None
            _check(replaced, rows, count)
            SampleSet(str(place)).clean_staging()
            found.append(
                {
                    "what": "settle", "rows": rows, "new": count, "seconds": seconds,
                    "cpu_seconds": cpu, "rewritten": replaced.settled.superseded,
                    "cores": default_parallelism(spark), "peak_mb": peaks(),
                    "ledger_bytes": size, "written_seconds": written,
                }
            )  # fmt: skip
    shutil.rmtree(place)
    return found[1:]


def _staged(spark: SparkSession, folder: Path, name: str, rows: DataFrame) -> DataFrame:
    rows.write.parquet(f"file://{folder}/{name}")
    return spark.read.schema(rows.schema).parquet(f"file://{folder}/{name}")


def _check(replaced: Replaced, rows: int, new: int) -> None:
    copies = len(range(1, new, 100))
    assert replaced.sums["outcome"] == {"sample": rows + new - copies, "duplicate": copies}
    assert replaced.added == new - copies
    assert replaced.removed == 0


def _cpu_seconds() -> float:
    # Spark's workers and JVM are children that have not ended, so the system is asked for them.
    import psutil

    here = psutil.Process()
    spent = 0.0
    for process in (here, *here.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        spent += times.user + times.system
    return spent


def main(argv: Sequence[str]) -> int:
    """Measure what is asked for, and print a line of JSON for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=float, default=1e6)
    parser.add_argument("--new", default="10000", help="numbers of new rows, between commas")
    parser.add_argument("--only", choices=("open", "settle"), help="one of the two")
    parser.add_argument("--folder", type=Path, default=Path("build/scale/simulated"))
    chosen = parser.parse_args(argv)
    rows, folder = int(chosen.rows), chosen.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        if chosen.only != "settle":
            print(json.dumps(opened(folder, rows)), flush=True)
        if chosen.only != "open":
            new = [int(float(count)) for count in chosen.new.split(",")]
            for line in settled(folder, rows, new):
                print(json.dumps(line), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"peak of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
