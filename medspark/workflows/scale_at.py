"""Train at many scales, one cell after the other, and report on them: jobs/scale_at.py."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession

from medspark import __version__, ownership
from medspark.documents import parse_json, read_regular
from medspark.eps import with_eps
from medspark.errors import MedsparkError
from medspark.evaluate.result import RobustnessResult
from medspark.files import DRAFT
from medspark.job import command_line, write_result
from medspark.launch.distributor import SPARK_SETTINGS, Task, run_ddp
from medspark.launch.hardware import hardware
from medspark.shards.manifest import Manifest, read_manifest
from medspark.spark.cluster import available_cores, is_local, task_cpus
from medspark.spark.session import spark_session
from medspark.spark.slots import slots_of
from medspark.study.cells import Cell, Study, StudyReport, digest, held_study, run_study
from medspark.study.forecast import predictions, step_models
from medspark.study.laws import StepModel, Window, all_reduce_constants, steady
from medspark.study.scale_report import summary_note, table, write_sweep
from medspark.study.sweep import Prediction, Probe, ScaleCell, ScalePoint, Sweep, curves, prices
from medspark.track.journal import JournalReader
from medspark.track.runs import TrackedRun
from medspark.track.spool import DatasetEntry, RunEntry, Spool
from medspark.track.store import tracking_uri
from medspark.train.probe import ProbeConfig, probe
from medspark.train.result import TrainResult
from medspark.train.run_folder import CHECKPOINTS, RUN_FILES
from medspark.workflows.demo import check_demo, demo_folder, demo_shards
from medspark.workflows.scale_compare import compare
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

__all__ = ["scale_at", "summary_text"]

logger = logging.getLogger(__name__)


def scale_at(config: ScaleAtConfig) -> dict[str, Any]:
    """Run the missing cells, report on all cells, and return the result document.

    Raises UsageError, before Spark starts, for an error in the configuration or the shards, and
    RunError at the end if cells have failed. The finished cells are kept and reported.
    """
    if config.compare:
        return compare(config)
    check_grid(config)
    _check_folders(config)
    settings = SPARK_SETTINGS | config.spark.settings
    spark_config = config.spark.model_copy(
        update={"settings": settings, "master": local_master(config)}
    )
    with (
        held_study(config.place),
        spark_session(spark_config, name="medspark scale_at") as spark,
    ):
        if config.shards is None:
            shards, _ = demo_shards(spark, config.demo)
            config = config.model_copy(update={"shards": shards})
            check_shares(config, read_manifest(shards))
        return _Sweeper(config, spark).run()


def _check_folders(config: ScaleAtConfig) -> None:
    """Raise UsageError if the sweep would write to its shards, or to a folder not medspark's."""
    shards = config.shards or demo_folder(config.demo)
    ownership.apart({"the shards": shards}, {"the folder of the sweep": config.place})
    ownership.check(config.place, "study")
    if config.shards is None:
        check_demo(config.demo)


def summary_text(result: Mapping[str, Any]) -> str:
    """Return the text that the job prints at the end of a sweep."""
    if "compared" in result:
        return f"Compared {', '.join(result['compared'])}: {result['report']}"
    lines = ["", result["table"], "", *result["sentences"], f"Report: {result['report']}"]
    return "\n".join(lines)


class _Sweeper:
    """One sweep: trains its cells, measures each, and reports on all of them."""

    def __init__(self, config: ScaleAtConfig, spark: SparkSession) -> None:
        assert config.shards is not None, "the demo's shards have been made"
        self._config = config
        self._spark = spark
        self._folder = config.place
        self._manifest = read_manifest(config.shards)
        self._cores, self._threads = _room(config, spark)
        # Filled as cells finish: efficiency is relative to the speed of one process.
        self._speeds: dict[ScalePoint, float] = {}

    def run(self) -> dict[str, Any]:
        """Run the missing cells and return the result document."""
        cells = [self._cell(point) for point in cells_of(self._config, self._threads)]
        return run_study(
            Study(
                cells=cells,
                report=self._report,
                entry=self._entry(),
                track=self._config.track,
                spool=self._folder / "sweep",
            )
        )

    def _cell(self, point: ScalePoint) -> Cell[ScaleCell]:
        config = training_of(self._config, point)
        name = _fingerprint(config, self._manifest)
        folder = self._folder / "cells" / name
        timed = timed_only(self._config, point)
        blank = ScaleCell(point=point, fingerprint=name, timed_only=timed)
        cell = Cell(
            name=str(point),
            blank=blank,
            file=folder / "measured.json",
            work=partial(self._train, blank, config, folder),
            size=1.0 if timed else point.data_share,
            alike=("timed" if timed else "trained", point.model, point.mode, str(point.world_size)),
        )
        if (kept := cell.kept()) is not None:
            self._speeds[point] = kept.images_per_second
            if "flags" not in kept.model_fields_set:
                _add_flags(kept, cell.file)
        return cell

    def _train(
        self, blank: ScaleCell, config: TrainAtConfig, folder: Path, parent_run_id: str | None
    ) -> ScaleCell:
        """Train the cell in ``folder`` and return its measurements."""
        self._forget(folder)
        point = blank.point
        crowded = point.world_size * point.threads_per_rank > self._cores
        new = blank.model_copy(update={"oversubscribed": crowded})
        found: dict[str, ScaleCell] = {}

        def measure(result: TrainResult) -> Mapping[str, float]:
            found["now"] = self._measure(new, result, folder)
            return found["now"].figures()

        result = train_once(
            config.model_copy(
                update={"track": config.track.model_copy(update={"parent_run_id": parent_run_id})}
            ),
            self._spark,
            folder,
            params=point.model_dump(mode="json"),
            tags={
                "medspark.job": "scale_at",
                "medspark.point": f"{point.model} {point.mode} {point.scaling} "
                f"{point.data_share:g}",
                "medspark.oversubscribed": str(new.oversubscribed).lower(),
                "medspark.timed_only": str(new.timed_only).lower(),
            },
            measure=measure,
            timed_only=new.timed_only,
        )
        ownership.remove(folder, CHECKPOINTS)
        self._speeds[point] = found["now"].images_per_second
        return found["now"].model_copy(update={"run_id": result.mlflow["run_id"]})

    def _measure(self, new: ScaleCell, result: TrainResult, folder: Path) -> ScaleCell:
        point = new.point
        windows = [
            Window(r.step, r.metrics["images_per_second"], r.metrics["data_wait_share"])
            for r in JournalReader(folder / "journal").poll()
            if "images_per_second" in r.metrics
        ]
        speed = steady(windows, warmup_steps=self._config.warmup_steps)
        assert speed is not None, "a training has reported its speed"
        base = self._base(point)
        judged = {} if new.timed_only else judged_figures(result)
        cores = point.world_size * point.threads_per_rank
        return new.model_copy(
            update={
                "train_images": result.train_images,
                "global_batch": result.global_batch,
                "images_per_second": speed.images_per_second,
                "data_wait_share": speed.data_wait_share,
                "communication_share": result.communication_share,
                "efficiency": speed.images_per_second / (point.world_size * base) if base else None,
                "startup": result.startup,
                "peak_memory_mb": result.peak_memory_mb,
                "core_seconds_per_million_images": 1e6 * cores / speed.images_per_second,
                "flags": () if new.timed_only else result.triggered_flags,
                **judged,
            }
        )

    def _base(self, point: ScalePoint) -> float | None:
        """Return the speed of one process in the same repeat, or None if it is not known yet."""
        if point.world_size == 1:
            return None
        alone = [
            point.model_copy(update={"world_size": 1, "scaling": scaling})
            for scaling in self._config.grid.scaling
        ]
        return next((self._speeds[one] for one in alone if one in self._speeds), None)

    def _forget(self, folder: Path) -> None:
        """Remove the files of an unfinished attempt at a cell, and end its run as KILLED."""
        if (folder / "run.json").exists():
            spool = Spool.reopen(folder, uri=tracking_uri(self._config.track.uri))
            if spool.state.ending is None:
                TrackedRun(spool).end("KILLED", patience_seconds=0)
        ownership.remove(folder, [*RUN_FILES, rf"\.?measured\.json(\.partial|{DRAFT})?"])

    def _report(self, records: Sequence[ScaleCell], run: TrackedRun) -> StudyReport:
        """Write the report on all cells."""
        sweep = self._sweep(records, self._probe(records))
        page = write_sweep(self._folder / "report", sweep)
        charts = run.charts_of_children(order_by="scale/images_per_second")
        return StudyReport(
            page=page,
            summary=parent_figures(sweep),
            tags={"mlflow.note.content": summary_note(sweep, charts=charts)},
            document={
                "sentences": sweep.sentences,
                "table": table(sweep),
                "report": str(page),
                "charts": charts,
                "dataset_digest": sweep.dataset_digest,
            },
        )

    def _probe(self, cells: Sequence[ScaleCell]) -> Probe | None:
        """Return the constants of the step model, measured with the most processes."""
        kept = self._folder / "probe.json"
        if kept.exists():
            return Probe.model_validate_json(kept.read_bytes())
        world = max((m.point.world_size for m in cells if m.finished), default=1)
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

    def _sweep(self, cells: Sequence[ScaleCell], measured: Probe | None) -> Sweep:
        """Return the record of the whole sweep, from which the report is made."""
        config, done = self._config, [m for m in cells if m.finished]
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
            command=command_line(),
            hardware=hardware(self._spark),
            dataset=str(config.shards),
            dataset_digest=self._manifest.digest,
            cells=list(cells),
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


def _add_flags(kept: ScaleCell, file: Path) -> None:
    """Add the flags of the cell's report to a record of an earlier version, which lacks them."""
    try:
        document = parse_json(read_regular(file.parent / "report" / "result.json"))
        result = RobustnessResult.model_validate(with_eps(document))
    except (OSError, ValueError):
        return  # the cell was only timed, so it has no report
    flagged = kept.model_copy(update={"flags": result.triggered_flags})
    write_result(file, flagged.model_dump(mode="json"))


def _room(config: ScaleAtConfig, spark: SparkSession) -> tuple[int, int]:
    """Return the number of cores, and the number of threads of each rank at every scale."""
    slots, wanted = slots_of(spark), max(config.grid.processes)
    local = is_local(spark)
    cores = available_cores() if local else slots.cores
    own = max(1, cores // wanted) if local else task_cpus(spark)
    return cores, config.launch.threads_per_process or own


def _fingerprint(config: TrainAtConfig, manifest: Manifest) -> str:
    """Return a digest of everything that decides the measurements of a cell."""
    parts = {"model", "attack", "train", "data", "evaluate", "seed", "launch"}
    decisive = config.model_dump(mode="json", include=parts)
    # Cells of earlier versions ran no sanity probes. A constant here lets them be found.
    decisive["evaluate"]["sanity_images"] = 0
    return digest(decisive | {"dataset": manifest.digest, "version": __version__})
