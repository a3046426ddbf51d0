"""The Spark prediction against its ceiling: bare processes that only read, decode, ask and write.

MEDSPARK_BENCH_FILES sets the number of files (10,000 of 512 x 512, 16 bit). The archives are those
of benchmarks/ingest.py. Starting Spark, or the bare processes, and opening the network are not
counted. The network is a MobileNet-V2 for images of 64 pixels, with random weights.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from functools import partial
from pathlib import Path

import torch
from bare_predict import bare
from ingest import FOLDER, TURNS, archive
from timing import Result

from medspark.images.deidentify import Privacy
from medspark.models.backbones import build
from medspark.models.checkpoint import describe, save_classifier
from medspark.models.config import ModelConfig
from medspark.predict.config import PredictConfig
from medspark.spark.session import SparkConfig, spark_session
from medspark.workflows.predict import Prediction

SIDE = 64


def _model(folder: Path) -> Path:
    torch.manual_seed(0)
    network = build(ModelConfig(name="mobilenetv2_100"), num_classes=2, channels=1)
    card = describe(network, classes=("a", "b"), height=SIDE, width=SIDE)
    save_classifier(folder, network, card)
    return folder


def vs_bare(syntax: str) -> Result:
    """Return images per second of the Spark job over those of the bare processes."""
    source, cores = archive(syntax), os.cpu_count() or 1
    paths = sorted(str(path) for path in source.rglob("*") if path.is_file())
    shares = [paths[number::cores] for number in range(cores)]
    shares = [[path for path in share if not path.endswith(".csv")] for share in shares]
    scratch = FOLDER / "predicted"
    model = _model(FOLDER / "model")
    key = FOLDER / "key"
    key.write_text(os.urandom(32).hex())
    key.chmod(0o600)
    config = PredictConfig(
        model=str(model),
        source=str(source),
        answers=str(scratch / "answers"),
        paths_file=scratch / "paths.csv",
        privacy=Privacy(key_file=key, quarantine_file=scratch / "quarantine.csv"),
    )
    settings = {"spark.ui.showConsoleProgress": "false"}
    spark_config = SparkConfig(master=f"local[{cores}]", settings=settings)
    ratios = []
    with (
        multiprocessing.get_context("spawn").Pool(cores) as pool,
        spark_session(spark_config) as spark,
    ):
        for turn in range(TURNS + 1):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            began = time.perf_counter()
            work = partial(bare, model=model, folder=scratch)
            pool.starmap(work, zip(shares, range(cores), strict=True))
            limit = time.perf_counter() - began
            began = time.perf_counter()
            result = Prediction(config).run(spark)
            ours = time.perf_counter() - began
            if result.answered != sum(map(len, shares)):
                raise RuntimeError(f"{result.answered} answers on {len(paths)} files")
            if turn:  # the first warms both up
                ratios.append(limit / ours)
    shutil.rmtree(scratch)
    return Result(tuple(ratios), goal=0.85, higher_is_better=True)


BENCHMARKS = {
    f"predict_vs_bare/{syntax}": partial(vs_bare, syntax) for syntax in ("explicit", "jpeg_2000")
}
