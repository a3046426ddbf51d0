"""The Spark ingest against its ceiling: bare processes that only read, decode, hash and write.

MEDSPARK_BENCH_FILES sets the number of files (10,000 of 512 x 512, 16 bit). The archives are made
once, below build/bench. Starting Spark, or the bare processes, is not counted.

Memory is that of the largest Python process below Spark, decoders included: over 20,000 small files
against 1,000, and over one multi-frame file of 500 MB.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from bare_ingest import SIZE, bare
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    ExplicitVRLittleEndian,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
)
from timing import Result

from medspark.images.phantom import PhantomConfig, write_archive
from medspark.ingest.archive import open_archive
from medspark.ingest.config import IngestConfig
from medspark.ingest.pipeline import ingest
from medspark.spark.session import SparkConfig, spark_session

FILES = int(os.environ.get("MEDSPARK_BENCH_FILES", "10000"))
TURNS = int(os.environ.get("MEDSPARK_BENCH_TURNS", "3"))
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
        config = IngestConfig(
            source=str(source),
            labels=str(source / "labels.csv"),
            samples=str(scratch / "samples"),
            image_size=SIZE,
        )
        for turn in range(TURNS + 1):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            began = time.perf_counter()
            pool.starmap(partial(bare, folder=scratch), zip(shares, range(cores), strict=True))
            limit = time.perf_counter() - began
            began = time.perf_counter()
            result = ingest(spark, open_archive(config, key=bytes(32)))
            ours = time.perf_counter() - began
            if result["frames"] != len(paths):
                raise RuntimeError(f"{result['frames']} samples of {len(paths)} files")
            if turn:  # the first warms both up
                ratios.append(limit / ours)
    shutil.rmtree(scratch)
    return Result(tuple(ratios), goal=0.85, higher_is_better=True)


def memory_growth() -> Result:
    """Return the memory of the workers over 20,000 files, in parts of that over 1,000."""
    few, many = (_peak_bytes(_small_files(count)) for count in (1_000, 20_000))
    return Result((many / few,), goal=1.1, higher_is_better=False)


def multiframe() -> Result:
    """Return the memory of the workers over a 500 MB file, in parts of the default of 1 GB."""
    folder = FOLDER / "multiframe"
    if not (folder / "labels.csv").exists():
        folder.mkdir(parents=True, exist_ok=True)
        frames, side = 1_000, 512
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID = MultiFrameGrayscaleWordSecondaryCaptureImageStorage
        data.SOPInstanceUID = "1.2"
        data.Rows, data.Columns, data.NumberOfFrames = side, side, frames
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        noise = np.random.default_rng(0).integers(0, 4096, (frames, side, side), dtype=np.uint16)
        data.PixelData = noise.tobytes()
        data.save_as(folder / "large.dcm", enforce_file_format=True)
        (folder / "labels.csv").write_text("path,label\nlarge.dcm,normal\n")
    return Result((_peak_bytes(folder) / 1e9,), goal=1.0, higher_is_better=False)


def _small_files(count: int) -> Path:
    folder = FOLDER / f"small-{count}"
    if not (folder / "labels.csv").exists():
        config = PhantomConfig(count=count, size=128, extras=False, processes=os.cpu_count() or 1)
        write_archive(folder, config)
    return folder


def _peak_bytes(source: Path) -> int:
    """Ingest ``source`` in a session of its own; return the most that one process held."""
    cores = os.cpu_count() or 1
    scratch = FOLDER / "out"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    config = IngestConfig(
        source=str(source), labels=str(source / "labels.csv"), samples=str(scratch / "samples"),
        image_size=64,
    )  # fmt: skip
    settings = {"spark.ui.showConsoleProgress": "false"}
    with (
        spark_session(SparkConfig(master=f"local[{cores}]", settings=settings)) as spark,
        _Watch() as watch,
    ):
        ingest(spark, open_archive(config, key=bytes(32)))
    shutil.rmtree(scratch)
    print(f"{source.name}: {watch.peak / 1e6:.0f} MB")
    return watch.peak


class _Watch(threading.Thread):
    """Measures the Python processes below this one repeatedly."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._end = 0, threading.Event()

    def run(self) -> None:
        """Note the largest until stopped."""
        while not self._end.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "python" in process.name():
                        # Pages of the files that it reads are the kernel's to take back.
                        info = process.memory_info()
                        self.peak = max(self.peak, info.rss - info.shared)

    def __enter__(self) -> _Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()


BENCHMARKS = {
    f"ingest_vs_limit/{syntax}": partial(vs_limit, syntax) for syntax in ("explicit", "jpeg_2000")
} | {"ingest_memory_growth": memory_growth, "ingest_multiframe_memory": multiframe}
