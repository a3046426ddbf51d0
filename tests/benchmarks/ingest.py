"""The Spark ingest against its ceiling: bare processes that only read, decode, hash and write.

MEDSPARK_BENCH_FILES sets the number of files (10,000 of 512 x 512, 16 bit). The archives are made
once, below build/bench. Starting Spark, or the bare processes, is not counted.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from functools import partial
from pathlib import Path

from bare_ingest import SIZE, bare
from timing import Result

from medspark.images.deidentify import Privacy
from medspark.images.phantom import PhantomConfig, write_archive
from medspark.ingest.archive import IngestConfig, ingest, open_archive
from medspark.ingest.session import SparkConfig, spark_session

FILES = int(os.environ.get("MEDSPARK_BENCH_FILES", "10000"))
TURNS = 3
FOLDER = Path("build/bench/ingest")


def archive(syntax: str) -> Path:
    """Return the folder of an archive of one transfer syntax, made if it is not there."""
    folder = FOLDER / f"{syntax}-{FILES}"
    if not (folder / "labels.csv").exists():
        config = PhantomConfig(
            count=FILES, size=512, syntaxes=(syntax,), bits=(16,), extras=False,
            processes=os.cpu_count() or 1,
        )  # fmt: skip
        write_archive(folder, config)
    return folder


def vs_limit(syntax: str) -> Result:
    """Return images per second of the Spark job over those of the bare processes."""
    source, cores = archive(syntax), os.cpu_count() or 1
    paths = [str(path) for path in sorted(source.rglob("*")) if path.is_file()]
    paths = [path for path in paths if not path.endswith(".csv")]
    shares = [paths[number::cores] for number in range(cores)]
    scratch = FOLDER / "out"
    ratios = []
    settings = {"spark.ui.showConsoleProgress": "false"}
    spark_config = SparkConfig(master=f"local[{cores}]", settings=settings)
    with (
        multiprocessing.get_context("spawn").Pool(cores) as pool,
        spark_session(spark_config) as spark,
    ):
        (FOLDER / "key").write_text("00" * 32)
        config = IngestConfig(
            source=str(source),
            labels=str(source / "labels.csv"),
            samples=str(scratch / "samples"),
            image_size=SIZE,
            privacy=Privacy(key_file=FOLDER / "key"),
        )
        for turn in range(TURNS + 1):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            began = time.perf_counter()
            pool.starmap(partial(bare, folder=scratch), zip(shares, range(cores), strict=True))
            limit = time.perf_counter() - began
            began = time.perf_counter()
            result = ingest(spark, open_archive(config))
            ours = time.perf_counter() - began
            if result["frames"] != len(paths):
                raise RuntimeError(f"{result['frames']} samples of {len(paths)} files")
            if turn:  # the first warms both up
                ratios.append(limit / ours)
    shutil.rmtree(scratch)
    return Result(tuple(ratios), goal=0.85, higher_is_better=True)


BENCHMARKS = {
    f"ingest_vs_limit/{syntax}": partial(vs_limit, syntax) for syntax in ("explicit", "jpeg_2000")
}
