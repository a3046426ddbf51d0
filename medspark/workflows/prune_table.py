"""Fill the table of prunings: networks x methods x sparsities x seeds, each pruned once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession

from medspark import __version__, ownership
from medspark.launch.distributor import SPARK_SETTINGS
from medspark.launch.hardware import hardware
from medspark.shards.manifest import read_manifest
from medspark.spark.session import spark_session
from medspark.study.cells import Cell, Study, StudyReport, digest, held_study, run_study
from medspark.study.prune_report import PruneCell, csv_text, markdown, prune_figure
from medspark.track.spool import RunEntry
from medspark.train.result import TrainResult
from medspark.train.run_folder import CHECKPOINTS
from medspark.workflows.prune import PruneTraining, training_of
from medspark.workflows.prune_table_config import PruneTableConfig, check_table
from medspark.workflows.train_at import train_once

__all__ = ["prune_table"]

# At a sparsity of 0 the other methods only fine-tune, as magnitude does.
_WITHOUT_PRUNING = ("magnitude", "noise")
# Raised when the same settings prune otherwise, so that no table mixes cells of both ways.
_PRUNING = 3


def prune_table(config: PruneTableConfig, *, command: str) -> dict[str, Any]:
    """Fill the table, write it after every cell, and return the result document.

    Raises UsageError, before Spark starts, for an error in the configuration or the data, and
    RunError at the end if cells have failed. The finished cells are kept and reported.
    """
    check_table(config)
    settings = SPARK_SETTINGS | config.spark.settings
    spark_config = config.spark.model_copy(update={"settings": settings})
    with (
        held_study(config.folder),
        spark_session(spark_config, name="medspark prune table") as spark,
    ):
        return _Table(config, spark, command).fill()


class _Table:
    """One table: its prunings, and its files."""

    def __init__(self, config: PruneTableConfig, spark: SparkSession, command: str) -> None:
        self._config, self._spark, self._command = config, spark, command
        self._folder = config.folder.resolve()
        self._manifest = read_manifest(config.shards)
        self.cells = [self._cell(blank) for blank in _blanks(config)]

    def fill(self) -> dict[str, Any]:
        """Run the missing cells and return the result document."""
        entry = RunEntry(
            name="prune table",
            config=self._config.model_dump(mode="json"),
            tags={"medspark.job": "prune_table"},
        )
        return run_study(
            Study(
                cells=self.cells,
                report=lambda records, _: self._write(records),
                entry=entry,
                track=self._config.track.model_copy(update={"system_metrics": False}),
                spool=self._folder / "mlflow",
                after_each=self._write,
            )
        )

    def _cell(self, blank: PruneCell) -> Cell[PruneCell]:
        training = self._training(blank)
        decisive = {
            "weights": training.deciding_weights(),
            "evaluate": training.evaluate.model_dump(mode="json"),
            "dataset": self._manifest.digest,
            "pruning": _PRUNING,
        }
        if training.decision.criterion is not None:
            decisive["decision"] = training.decision.model_dump(mode="json")
        name = digest(decisive)
        return Cell(
            name=f"{blank.model}, {blank.method} at {100 * blank.sparsity:g} %, seed {blank.seed}",
            blank=blank,
            file=self._folder / "cells" / f"{name}.json",
            work=partial(self._prune, blank, training, self._folder / "networks" / name),
            alike=(blank.model, blank.method),
        )

    def _training(self, blank: PruneCell) -> PruneTraining:
        chosen = {"method": blank.method, "sparsity": blank.sparsity}
        how = self._config.prune.model_copy(update=chosen)
        training = training_of(self._config, self._config.models[blank.model], how)
        # An interrupted cell resumes from its newest checkpoint.
        return training.model_copy(update={"seed": blank.seed, "resume": "auto"})

    def _prune(
        self, blank: PruneCell, training: PruneTraining, folder: Path, parent_run_id: str | None
    ) -> PruneCell:
        track = training.track.model_copy(update={"parent_run_id": parent_run_id, "run_name": None})
        folder.mkdir(parents=True, exist_ok=True)
        result = train_once(training.model_copy(update={"track": track}), self._spark, folder)
        ownership.remove(folder, CHECKPOINTS)  # several times as large as the network
        found = _figures(result, eps=training.attack.eps)
        chosen = {"flags": result.triggered_flags, "network": result.model}
        return blank.model_copy(update=found | chosen)

    def _write(self, records: Sequence[PruneCell]) -> StudyReport:
        """Write the table with the cells finished so far."""
        folder = self._folder / "table"
        folder.mkdir(parents=True, exist_ok=True)
        text = markdown(records, facts=self._facts())
        (folder / "prune.md").write_text(text, encoding="utf-8")
        (folder / "prune.csv").write_text(csv_text(records), encoding="utf-8")
        prune_figure(records).savefig(folder / "prune.png", dpi=110)
        names = {"table": "prune.md", "csv": "prune.csv", "figure": "prune.png"}
        files = {name: str(folder / file) for name, file in names.items()}
        return StudyReport(page=folder / "prune.md", document=files)

    def _facts(self) -> Mapping[str, str]:
        config, rows = self._config, self._manifest.splits
        test = config.evaluate
        return {
            "command": f"`{self._command}`",
            "hardware": f"{hardware(self._spark)}; medspark {__version__}",
            "data": f"{self._manifest.height} x {self._manifest.width} px, {rows['train'].rows} "
            f"training and {rows['test'].rows} test images, digest {self._manifest.digest[:12]}",
            "training": f"{config.train.epochs} epochs of {config.train.mode} in batches of "
            f"{config.train.batch_size} at {config.attack}; batch norm {config.train.batch_norm}",
            "attacks": f"{', '.join(test.attacks)}; {test.steps} steps of PGD",
        }


def _blanks(config: PruneTableConfig) -> Iterator[PruneCell]:
    """Yield the cells to fill: the first seed of all, then the others."""
    for seed in config.seeds:
        for model in config.models:
            for sparsity in config.sparsities:
                for method in config.methods:
                    if sparsity > 0 or method in _WITHOUT_PRUNING:
                        yield PruneCell(model=model, method=method, sparsity=sparsity, seed=seed)


def _figures(result: TrainResult, *, eps: float) -> dict[str, float | None]:
    found = {
        "zeros": result.sparsity,
        "clean": result.clean.accuracy,
        "pgd": result.value("pgd", "accuracy", eps=eps),
        "worst": result.value("worst_case", "accuracy", eps=eps),
    }
    if result.noise is None:
        return found
    noise = result.noise
    return found | {
        "noise_clean": noise.clean,
        "noise_pgd": noise.pgd,
        "noise_worst": noise.worst,
        "masked": noise.masked,
    }
