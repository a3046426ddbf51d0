"""Run the paper's experiment: train and attack networks x datasets x trainings, make one table."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyspark.sql import SparkSession

from medspark import __version__, ownership
from medspark.attacks.config import AttackName
from medspark.errors import MedsparkError, RunError
from medspark.evaluate.result import metrics_by_name
from medspark.job import command_line, write_result
from medspark.launch.distributor import SPARK_SETTINGS
from medspark.launch.hardware import hardware
from medspark.shards.manifest import read_manifest
from medspark.spark.session import spark_session
from medspark.study.cells import Cell, Study, StudyReport, digest, held_study, run_study
from medspark.study.paper_figure import paper_figure
from medspark.study.paper_report import (
    METRICS,
    Column,
    TableCell,
    columns,
    csv_text,
    markdown,
)
from medspark.track.config import TrackConfig
from medspark.track.runs import tracked
from medspark.track.spool import DatasetEntry, RunEntry
from medspark.train.run_folder import CHECKPOINTS
from medspark.workflows.demo import demo_shards
from medspark.workflows.evaluate import Evaluation
from medspark.workflows.evaluate_config import EvaluationConfig
from medspark.workflows.paper_plan import (
    Dataset,
    Network,
    PaperTableConfig,
    check,
    check_shards,
    distillation,
    fingerprint,
    networks,
    phantom_sets,
    recipe,
    surrogates,
)
from medspark.workflows.train_at import train_once

__all__ = ["paper_table"]

logger = logging.getLogger(__name__)


def paper_table(config: PaperTableConfig) -> dict[str, Any]:
    """Fill the table, write it after every cell, and return the result document.

    Raises UsageError, before Spark starts, for an error in the configuration or the data, and
    RunError at the end if cells have failed. The finished cells are kept and reported.
    """
    check(config)
    settings = SPARK_SETTINGS | config.spark.settings
    spark_config = config.spark.model_copy(update={"settings": settings})
    with (
        held_study(config.folder),
        spark_session(spark_config, name="medspark paper table") as spark,
    ):
        return _Table(config, spark).fill()


class _Table:
    """One table: its networks, their training and evaluation, and the files of the table."""

    def __init__(self, config: PaperTableConfig, spark: SparkSession) -> None:
        self._config = config
        self._spark = spark
        self._folder = config.folder.resolve()
        self._datasets = list(self._find_datasets())
        self.cells = [self._cell(network) for network in networks(config, self._datasets)]
        self._columns: list[Column] = columns(
            config.evaluate.eps, attacks=self._attacks(), named=config.columns
        )

    def fill(self) -> dict[str, Any]:
        """Run the missing cells and return the result document."""
        entry = RunEntry(
            name="paper table",
            config=self._config.model_dump(mode="json"),
            tags={"medspark.job": "paper_table"},
        )
        return run_study(
            Study(
                cells=self.cells,
                report=lambda records, _: self._write(records),
                entry=entry,
                # The trainings and evaluations below record processor and memory.
                track=self._config.track.model_copy(update={"system_metrics": False}),
                spool=self._folder / "mlflow",
                after_each=self._write,
            )
        )

    def _cell(self, network: Network) -> Cell[TableCell]:
        weights = self._config.weights.get(network.model)
        blank = TableCell(
            dataset=network.dataset.name,
            train_images=network.dataset.train_images,
            model=network.model,
            training=network.training,
            weights="random" if weights is None else Path(weights).name,
            seed=network.seed,
        )
        return Cell(
            name=str(network),
            blank=blank,
            file=self._cell_file(network),
            work=partial(self._train_and_attack, network, blank),
            size=network.dataset.train_images,
            alike=(network.model, network.training),
        )

    def _find_datasets(self) -> Iterator[Dataset]:
        for name, folder in self._sources():
            for share in self._config.data_share:
                title = name if share == 1 else f"{name} {100 * share:g} %"
                yield Dataset(title, folder, read_manifest(folder), share)

    def _sources(self) -> Iterator[tuple[str, Path]]:
        for name, folder in self._config.datasets.items():
            yield name, folder.resolve()
        for demo in phantom_sets(self._config):
            shards, _ = demo_shards(self._spark, demo)
            check_shards(shards, self._config.evaluate)
            yield f"phantom {demo.count}", shards.resolve()

    def _train_and_attack(
        self, network: Network, blank: TableCell, parent_run_id: str | None
    ) -> TableCell:
        manifest = network.dataset.manifest
        entry = RunEntry(
            name=str(network),
            config={"network": network.model, "training": network.training, "seed": network.seed},
            tags={"medspark.job": "paper_table", "medspark.training": network.training},
            dataset=DatasetEntry(
                name=network.dataset.name,
                digest=manifest.digest,
                source=str(network.dataset.folder),
            ),
        )
        track = self._track(parent_run_id).model_copy(update={"system_metrics": False})
        with tracked(self._cell_file(network).with_suffix(".mlflow"), track, entry) as run:
            below = self._track(run.reference["run_id"])
            model = self._trained(network, below)
            others = [self._surrogate(other, below) for other in surrogates(self._config, network)]
            evaluate = self._config.evaluate.model_dump() | {"attacks": self._attacks()}
            evaluation = Evaluation(
                EvaluationConfig(
                    **evaluate,
                    model=str(model),
                    surrogates=tuple(map(str, others)),
                    shards=network.dataset.folder,
                    folder=self._folder / "evaluations",
                    track=_named(below, f"attack {network}"),
                )
            )
            result = evaluation.run(self._spark)
            figures = tuple(f for f in result.figures() if f.metric in METRICS)
            run.end(
                "FINISHED",
                summary=metrics_by_name(figures),
                patience_seconds=self._config.track.patience_seconds,
            )
        return blank.model_copy(update={"figures": figures, "flags": result.triggered_flags})

    def _trained(self, network: Network, track: TrackConfig) -> Path:
        """Return the folder of the trained ``network``, trained if it is not there."""
        folder = self._folder / "networks" / fingerprint(self._config, network)
        if (folder / "trained.json").is_file():
            return folder / "model"
        config = recipe(self._config, network).model_copy(
            update={
                "run_dir": folder,
                "shards": network.dataset.folder,
                "track": _named(track, f"train {network}"),
            }
        )
        if network.teacher is not None:
            taught_by = self._trained(network.teacher, track)
            config = config.model_copy(
                update={"distill": distillation(self._config, network, taught_by)}
            )
        logger.info("training %s", network)
        result = train_once(config, self._spark, folder)
        write_result(folder / "trained.json", result.as_json())
        # Checkpoints are several times as large as the network, and no longer needed.
        ownership.remove(folder, CHECKPOINTS)
        return folder / "model"

    def _surrogate(self, network: Network, track: TrackConfig) -> Path:
        """Return the folder of another cell's ``network``, trained if it is not there."""
        try:
            return self._trained(network, track)
        except MedsparkError as error:
            raise RunError(f"Its surrogate ({network}) failed: {error}") from error

    def _cell_file(self, network: Network) -> Path:
        evaluate = self._config.evaluate.model_dump(mode="json") | {"attacks": self._attacks()}
        # Earlier versions named their cells by eps in grey levels.
        evaluate["eps"] = [255 * eps for eps in self._config.evaluate.eps]
        decisive = {"network": fingerprint(self._config, network), "evaluate": evaluate}
        if self._config.evaluate.images is not None:
            decisive["images"] = "drawn"  # earlier versions attacked the first images
        others = surrogates(self._config, network)
        if others:
            decisive["surrogates"] = [fingerprint(self._config, other) for other in others]
        return self._folder / "cells" / f"{digest(decisive)}.json"

    def _attacks(self) -> tuple[AttackName, ...]:
        return tuple(dict.fromkeys(("fgsm", *self._config.evaluate.attacks)))

    def _track(self, parent: str | None) -> TrackConfig:
        return self._config.track.model_copy(update={"parent_run_id": parent, "run_name": None})

    def _write(self, records: Sequence[TableCell]) -> StudyReport:
        """Write the table with the cells finished so far."""
        folder = self._folder / "table"
        folder.mkdir(parents=True, exist_ok=True)
        text = markdown(
            records,
            self._columns,
            metric=self._config.metric,
            title="Clean and attacked, undefended and defended",
            facts=self._facts(),
        )
        (folder / "table.md").write_text(text, encoding="utf-8")
        (folder / "table.csv").write_text(csv_text(records), encoding="utf-8")
        figure = paper_figure(records, self._columns, metric=self._config.metric)
        figure.savefig(folder / "table.png", dpi=110)
        names = {"table": "table.md", "csv": "table.csv", "figure": "table.png"}
        files = {name: str(folder / file) for name, file in names.items()}
        return StudyReport(page=folder / "table.md", document=files)

    def _facts(self) -> Mapping[str, str]:
        config, evaluate = self._config, self._config.evaluate
        transfers = "transfer" in evaluate.attacks
        from_others = "; transfer: from the other models' original networks" if transfers else ""
        return {
            "command": f"`{command_line()}`",
            "hardware": f"{hardware(self._spark)}; torch {torch.__version__}, "
            f"medspark {__version__}",
            "data": "; ".join(map(self._describe, self._datasets)),
            "training": f"epochs: {config.train.epochs}; batches of {config.train.batch_size}; "
            + self._trainings(),
            "attacks": f"{', '.join(self._attacks())}; {evaluate.norm}, {evaluate.steps} steps of "
            f"PGD, random starts: {evaluate.restarts}{from_others}",
            "intervals": f"95 %, {evaluate.bootstrap} bootstrap resamples of the patients",
            "seeds": ", ".join(map(str, config.seeds)),
        }

    def _trainings(self) -> str:
        config, train = self._config, self._config.train
        inner = {"pgd": f"{train.inner_steps} steps"}
        inner["trades"] = f"{inner['pgd']}, beta {train.beta:g}"
        told = [f"adversarial: {train.mode} at {config.attack}"]
        told += [
            f"{name}: {inner[name]}, at {config.attack}"
            for name in config.trainings
            if name in inner
        ]
        told.append(
            f"distillation: defensive, teacher and student at temperature {config.temperature:g}"
        )
        return "; ".join(told)

    def _describe(self, dataset: Dataset) -> str:
        manifest, evaluate = dataset.manifest, self._config.evaluate
        split = manifest.splits[evaluate.split]
        attacked = min(split.rows, evaluate.images or split.rows)
        return (
            f"{dataset.name}: {manifest.height} x {manifest.width} px, {attacked} of {split.rows} "
            f"{evaluate.split} images, {split.patients} patients in them, digest "
            f"{manifest.digest[:12]}"
        )


def _named(track: TrackConfig, name: str) -> TrackConfig:
    return track.model_copy(update={"run_name": name})
