"""Train at many scales, one after the other, and say what was seen: what jobs/scale_at.py does."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pyspark.sql import SparkSession

from medspark import __version__, ownership
from medspark.config import first_problem
from medspark.documents import read_regular
from medspark.errors import MedsparkError, RunError, UsageError
from medspark.launch.distributor import SPARK_SETTINGS, Task, run_ddp
from medspark.launch.hardware import hardware
from medspark.lock import locked
from medspark.redact import redacted_command, safe_text
from medspark.shards.manifest import Manifest, read_manifest
from medspark.spark.session import spark_session
from medspark.spark.slots import available_cores, local_slots, slots_of
from medspark.study.forecast import predictions, step_models
from medspark.study.laws import (
    StepModel,
    Window,
    all_reduce_constants,
    steady,
)
from medspark.study.scale_report import compare_sweeps, summary_note, table, write_sweep
from medspark.study.sweep import Cell, Measured, Prediction, Probe, Sweep, curves, prices
from medspark.track.journal import JournalReader
from medspark.track.models import fetch_artifact
from medspark.track.runs import TrackedRun, tracked
from medspark.track.spool import DatasetEntry, RunEntry, Spool
from medspark.track.store import tracking_uri
from medspark.train.probe import ProbeConfig, probe
from medspark.train.run_folder import CHECKPOINTS, RUN_FILES
from medspark.workflows.demo import check_demo, demo_folder, demo_shards
from medspark.workflows.scale_figures import (
    assumed_cluster,
    gradient_bytes,
    judged_figures,
    parent_figures,
    projected,
)
from medspark.workflows.scale_grid import (
    ScaleAtConfig,
    cells_of,
    check_grid,
    check_shares,
    local_master,
    timed_only,
    training_of,
)
from medspark.workflows.train_at import TrainAtConfig, train_once

__all__ = ["scale_at", "told"]

logger = logging.getLogger(__name__)


def scale_at(config: ScaleAtConfig) -> dict[str, Any]:
    """Run the cells that are missing, report on all of them, and return the result document.

    A cell that fails is recorded as such, and the sweep goes on. Raises UsageError, before Spark
    starts, for whatever is wrong with the configuration or the shards, and RunError where no cell
    came to its end.
    """
    if config.compare:
        return _compare(config)
    check_grid(config)
    _check_folders(config)
    settings = SPARK_SETTINGS | config.spark.settings
    spark_config = config.spark.model_copy(
        update={"settings": settings, "master": local_master(config)}
    )
    ownership.claim(config.place, "study")
    with (
        locked(config.place),
        spark_session(spark_config, name="medspark scale_at") as spark,
    ):
        if config.shards is None:
            shards, _ = demo_shards(spark, config.demo)
            config = config.model_copy(update={"shards": shards})
            check_shares(config, read_manifest(shards))
        return _Sweeper(config, spark).run()


def _check_folders(config: ScaleAtConfig) -> None:
    """Raise UsageError for a sweep into what it reads, or into a stranger's folder."""
    shards = config.shards or demo_folder(config.demo)
    ownership.apart({"the shards": shards}, {"the folder of the sweep": config.place})
    ownership.check(config.place, "study")
    if config.shards is None:
        check_demo(config.demo)


def told(result: Mapping[str, Any]) -> str:
    """Return what a person wants to read at the end of a sweep."""
    if "compared" in result:
        return f"Compared {', '.join(result['compared'])}: {result['report']}"
    lines = ["", result["table"], "", *result["sentences"]]
    lines += [f"FAILED: {failed}" for failed in result["failed"]]
    return "\n".join([*lines, f"Report: {result['report']}"])


class _Sweeper:
    """Runs the cells one after the other; the sweep's folder remembers which are done."""

    def __init__(self, config: ScaleAtConfig, spark: SparkSession) -> None:
        assert config.shards is not None, "the demo's shards have been made"
        self._config = config
        self._spark = spark
        self._folder = config.place
        self._manifest = read_manifest(config.shards)
        self._cores, self._threads = _room(config, spark)
        self._cells = cells_of(config, self._threads)
        self._measured: dict[Cell, Measured] = {}
        self._began = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Run what is missing and return the result document."""
        config = self._config
        with tracked(self._folder / "sweep", config.track, self._entry()) as run:
            parent = run.reference["run_id"]
            for number, cell in enumerate(self._cells, start=1):
                self._measured[cell] = self._do(cell, parent)
                logger.info("%s", self._progress(number, cell))
            sweep = self._sweep(self._probe())
            report = write_sweep(self._folder / "report", sweep)
            if not sweep.finished:
                raise RunError(f"No cell came to its end. The first: {sweep.cells[0].error}")
            charts = run.charts_of_children(order_by="scale/images_per_second")
            run.end(
                "FINISHED",
                summary=parent_figures(sweep),
                tags={"mlflow.note.content": summary_note(sweep, charts=charts)},
                artifacts=self._folder / "report",
                patience_seconds=config.track.patience_seconds,
            )
        failed = [m for m in sweep.cells if m.status == "failed"]
        return {
            "cells": [m.model_dump(mode="json") for m in sweep.cells],
            "failed": [f"{m.cell}: {m.error.splitlines()[0]}" for m in failed],
            "sentences": sweep.sentences,
            "table": table(sweep),
            "report": str(report),
            "dataset_digest": sweep.dataset_digest,
            "mlflow": run.reference | {"charts": charts},
        }

    def _do(self, cell: Cell, parent: str | None) -> Measured:
        """Return what came of ``cell``, now or earlier."""
        config = training_of(self._config, cell)
        name = _fingerprint(config, self._manifest)
        folder = self._folder / "cells" / name
        kept = folder / "measured.json"
        if kept.exists():
            return Measured.model_validate_json(kept.read_bytes())
        self._forget(folder)
        began = time.monotonic()
        new = Measured(
            cell=cell,
            fingerprint=name,
            status="failed",
            oversubscribed=cell.world_size * cell.threads_per_rank > self._cores,
            timed_only=timed_only(self._config, cell),
        )
        try:
            measured = self._train(new, config, folder, parent)
        except MedsparkError as error:
            logger.warning("the sweep goes on without a cell (%s): %s", cell, error)
            return new.model_copy(update={"error": safe_text(str(error))})
        measured = measured.model_copy(update={"seconds": time.monotonic() - began})
        kept.write_text(measured.model_dump_json(indent=1), encoding="utf-8")
        return measured

    def _train(
        self, new: Measured, config: TrainAtConfig, folder: Path, parent: str | None
    ) -> Measured:
        found: dict[str, Measured] = {}

        def measure(result: Mapping[str, Any]) -> Mapping[str, float]:
            found["now"] = self._measure(new, result, folder)
            return found["now"].figures()

        cell = new.cell
        result = train_once(
            config.model_copy(
                update={"track": config.track.model_copy(update={"parent_run_id": parent})}
            ),
            self._spark,
            folder,
            params=cell.model_dump(mode="json"),
            tags={
                "medspark.job": "scale_at",
                "medspark.point": f"{cell.model} {cell.mode} {cell.scaling} {cell.data_share:g}",
                "medspark.oversubscribed": str(new.oversubscribed).lower(),
                "medspark.timed_only": str(new.timed_only).lower(),
            },
            measure=measure,
            timed_only=new.timed_only,
        )
        ownership.remove(folder, CHECKPOINTS)
        return found["now"].model_copy(update={"run_id": result.mlflow["run_id"]})

    def _measure(self, new: Measured, result: Mapping[str, Any], folder: Path) -> Measured:
        cell = new.cell
        windows = [
            Window(r.step, r.metrics["images_per_second"], r.metrics["data_wait_share"])
            for r in JournalReader(folder / "journal").poll()
            if "images_per_second" in r.metrics
        ]
        speed = steady(windows, warmup_steps=self._config.warmup_steps)
        assert speed is not None, "a training has reported its speed"
        base = self._base(cell)
        judged = {} if new.timed_only else judged_figures(result)
        cores = cell.world_size * cell.threads_per_rank
        return new.model_copy(
            update={
                "status": "finished",
                "train_images": result["train_images"],
                "global_batch": result["global_batch"],
                "images_per_second": speed.images_per_second,
                "data_wait_share": speed.data_wait_share,
                "communication_share": result["communication_share"],
                "efficiency": speed.images_per_second / (cell.world_size * base) if base else None,
                "startup": result["startup"],
                "peak_memory_mb": result["peak_memory_mb"],
                "core_seconds_per_million_images": 1e6 * cores / speed.images_per_second,
                **judged,
            }
        )

    def _base(self, cell: Cell) -> float | None:
        """Return the speed of one process of the same repeat; None where there is none yet."""
        if cell.world_size == 1:
            return None
        for scaling in self._config.grid.scaling:
            alone = cell.model_copy(update={"world_size": 1, "scaling": scaling})
            measured = self._measured.get(alone)
            if measured is not None and measured.status == "finished":
                return measured.images_per_second
        return None

    def _forget(self, folder: Path) -> None:
        """Remove what an attempt at a cell left that came to no end; its run did not either."""
        if (folder / "run.json").exists():
            spool = Spool.reopen(folder, uri=tracking_uri(self._config.track.uri))
            if spool.state.ending is None:
                TrackedRun(spool).end("KILLED", patience_seconds=0)
        ownership.remove(folder, [*RUN_FILES, r"measured\.json"])

    def _probe(self) -> Probe | None:
        """Return the constants of the step model, measured with the most processes."""
        kept = self._folder / "probe.json"
        if kept.exists():
            return Probe.model_validate_json(kept.read_bytes())
        world = max((m.cell.world_size for m in self._done()), default=1)
        if world < 2:
            return None
        assert self._config.shards is not None
        task = Task(
            function=f"{probe.__module__}:{probe.__qualname__}",
            config=ProbeConfig(
                shards=self._config.shards.resolve(),
                data=self._config.data,
                batch_size=self._config.train.batch_size,
            ),
            run_dir=self._folder / "probe",
            journal=self._folder / "probe" / "journal",
            checkpoints=self._folder / "probe" / "checkpoints",
        )
        launch = self._config.launch.model_copy(
            update={"processes": world, "threads_per_process": self._threads}
        )
        try:
            found, _ = run_ddp(task, spark=self._spark, launch=launch)
        except MedsparkError as error:
            logger.warning("no projection: the all-reduce could not be timed: %s", error)
            return None
        timed = [(float(size), seconds) for size, seconds in found["all_reduce"].items()]
        latency, bandwidth = all_reduce_constants(world, timed)
        measured = Probe(
            processes=world,
            latency=latency,
            bandwidth=bandwidth,
            loader_images_per_second=found["loader_images_per_second"],
        )
        kept.write_text(measured.model_dump_json(indent=1), encoding="utf-8")
        return measured

    def _done(self) -> list[Measured]:
        return [m for m in self._measured.values() if m.status == "finished"]

    def _sweep(self, measured: Probe | None) -> Sweep:
        """Return everything that is reported."""
        config, done = self._config, self._done()
        drawn = curves(done)
        models: dict[str, StepModel] = {}
        foreseen: list[Prediction] = []
        if measured is not None:
            models = step_models(
                drawn,
                measured,
                gradient_bytes={
                    name: gradient_bytes(config, name, self._manifest)
                    for name in {curve.model for curve in drawn}
                },
                image_bytes=self._manifest.pixel_format.nbytes,
            )
            foreseen = predictions(drawn, models, measured, batch_size=config.train.batch_size)
        cluster = assumed_cluster(config, [m.startup["total"] for m in done if m.startup])
        return Sweep(
            name=self._folder.name,
            command=redacted_command(["spark-submit", *sys.argv]),
            hardware=hardware(self._spark),
            dataset=str(config.shards),
            dataset_digest=self._manifest.digest,
            cells=list(self._measured.values()),
            curves=drawn,
            prices=prices(done),
            probe=measured,
            step_models=models,
            predictions=foreseen,
            cluster=cluster,
            projections={
                name: list(projected(config, model, cluster)) for name, model in models.items()
            },
        )

    def _entry(self) -> RunEntry:
        return RunEntry(
            name=f"sweep {self._folder.name}",
            config=self._config.model_dump(mode="json"),
            tags={"medspark.job": "scale_at", "medspark.sweep": self._folder.name},
            dataset=DatasetEntry(
                name=Path(str(self._config.shards)).name,
                digest=self._manifest.digest,
                source=str(self._config.shards),
            ),
        )

    def _progress(self, number: int, cell: Cell) -> str:
        measured = self._measured[cell]
        spent = time.monotonic() - self._began
        left = spent / number * (len(self._cells) - number) / 60
        said = (
            f"{measured.images_per_second:.1f} images/s"
            if measured.status == "finished"
            else "FAILED"
        )
        count = len(self._cells)
        return f"cell {number} of {count}: {cell}: {said}; about {left:.0f} min left"


def _room(config: ScaleAtConfig, spark: SparkSession) -> tuple[int, int]:
    """Return how many cores there are, and how many threads every rank gets at every scale."""
    slots, wanted = slots_of(spark), max(config.grid.processes)
    local = local_slots(str(spark.sparkContext.master)) is not None
    cores = available_cores() if local else slots.cores
    own = max(1, cores // wanted) if local else int(spark.conf.get("spark.task.cpus", "1") or 1)
    return cores, config.launch.threads_per_process or own


def _fingerprint(config: TrainAtConfig, manifest: Manifest) -> str:
    """Return a name for everything that decides what a cell measures."""
    parts = {"model", "attack", "train", "data", "evaluate", "seed", "launch"}
    decisive = config.model_dump(mode="json", include=parts) | {
        "dataset": manifest.digest,
        "version": __version__,
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def _compare(config: ScaleAtConfig) -> dict[str, Any]:
    if len(config.compare) < 2:
        raise UsageError("compare: give two sweeps or more, --compare RUN RUN.")
    sweeps = [_find_sweep(name, config) for name in config.compare]
    ownership.claim(config.place, "study")
    report = compare_sweeps(config.place / "compared", sweeps)
    return {"compared": list(config.compare), "report": str(report)}


def _find_sweep(name: str, config: ScaleAtConfig) -> Sweep:
    for path in (Path(name), Path(name) / "sweep.json", Path(name) / "report" / "sweep.json"):
        if path.is_file() and path.name == "sweep.json":
            return _read_sweep(path)
    if os.sep in name or Path(name).exists():
        raise UsageError(f"compare: {name} is not the folder of a sweep: it has no sweep.json.")
    return _read_sweep(fetch_artifact(name, "sweep.json", config.track))


def _read_sweep(path: Path) -> Sweep:
    try:
        return Sweep.model_validate_json(read_regular(path))
    except OSError as error:
        raise UsageError(f"compare: {path} cannot be read: {error.strerror}.") from None
    except ValidationError as error:
        problem = first_problem(error)
        raise UsageError(f"compare: {path} is no record of a sweep: {problem}.") from None
