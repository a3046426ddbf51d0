"""The paper's experiment: networks x datasets x trainings, each attacked, as one table."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pyspark.sql import SparkSession

from medspark import __version__, ownership
from medspark.attacks.config import AttackName
from medspark.eps import eps_name, with_eps
from medspark.errors import MedsparkError, RunError
from medspark.job import write_result
from medspark.launch.distributor import SPARK_SETTINGS
from medspark.launch.hardware import hardware
from medspark.lock import locked
from medspark.redact import safe_text
from medspark.shards.manifest import read_manifest
from medspark.spark.session import spark_session
from medspark.study.paper_figure import paper_figure
from medspark.study.paper_report import (
    Cell,
    Column,
    columns,
    csv_text,
    markdown,
    measured,
    seconds_left,
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
    digest,
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


def paper_table(config: PaperTableConfig, *, command: str) -> dict[str, Any]:
    """Fill the table, write it after every cell, and return the result document.

    Raises UsageError, before Spark starts, for whatever is wrong with the configuration or the
    data, and RunError at the end if cells have failed; the others are kept.
    """
    check(config)
    settings = SPARK_SETTINGS | config.spark.settings
    spark_config = config.spark.model_copy(update={"settings": settings})
    ownership.claim(config.folder, "study")
    with (
        locked(config.folder),
        spark_session(spark_config, name="medspark paper table") as spark,
    ):
        return _Table(config, spark, command).fill()


class _Table:
    """One table: which cells there are, which are done, and how the others come about."""

    def __init__(self, config: PaperTableConfig, spark: SparkSession, command: str) -> None:
        self._config = config
        self._spark = spark
        self._command = command
        self._folder = config.folder.resolve()
        self._datasets = list(self._find_datasets())
        self._networks = list(networks(config, self._datasets))
        self._cells = [self._kept(network) or self._blank(network) for network in self._networks]
        self._columns: list[Column] = columns(config.evaluate.eps, attacks=self._attacks())

    def fill(self) -> dict[str, Any]:
        """Do the cells that are missing and return the result document."""
        entry = RunEntry(
            name="paper table",
            config=self._config.model_dump(mode="json"),
            tags={"medspark.job": "paper_table"},
        )
        # The trainings and evaluations below record processor and memory.
        track = self._config.track.model_copy(update={"system_metrics": False})
        with tracked(self._folder / "mlflow", track, entry) as run:
            for number in range(len(self._cells)):
                if not self._cells[number].figures:
                    self._tell(number)
                    self._cells[number] = self._do(number, parent=run.reference["run_id"])
                    self._write()
            files = self._write()
            failed = [cell for cell in self._cells if cell.failure is not None]
            run.end(
                "FAILED" if failed else "FINISHED",
                summary={"cells": len(self._cells), "failed": len(failed)},
                artifacts=self._folder / "table",
                patience_seconds=self._config.track.patience_seconds,
            )
        if failed:
            raise RunError(
                f"{len(failed)} of {len(self._cells)} cells failed, the first with: "
                f"{failed[0].failure} The table is in {files['table']}; the same command tries "
                "them again."
            )
        cells = [cell.model_dump(mode="json") for cell in self._cells]
        return {"cells": cells, **files, "mlflow": run.reference}

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

    def _tell(self, number: int) -> None:
        pending = [cell for cell in self._cells[number:] if not cell.figures]
        left = seconds_left(pending, [cell for cell in self._cells if cell.figures])
        about = "" if left is None else f"; about {_minutes(left)} left"
        network = self._networks[number]
        logger.info("cell %d of %d: %s%s", number + 1, len(self._cells), network, about)

    def _do(self, number: int, *, parent: str | None) -> Cell:
        network, blank = self._networks[number], self._blank(self._networks[number])
        try:
            cell = self._train_and_attack(network, blank, parent)
        except MedsparkError as error:
            first, *_ = safe_text(str(error)).splitlines()
            logger.warning("cell %d of %d failed: %s", number + 1, len(self._cells), error)
            cell = blank.model_copy(update={"failure": first})
        self._cell_file(network).parent.mkdir(parents=True, exist_ok=True)
        write_result(self._cell_file(network), cell.model_dump(mode="json"))
        return cell

    def _train_and_attack(self, network: Network, blank: Cell, parent: str | None) -> Cell:
        began = time.monotonic()
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
        track = self._track(parent).model_copy(update={"system_metrics": False})
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
            report = evaluation.run(self._spark).as_json()
            figures = measured(report)
            run.end(
                "FINISHED",
                summary={f"{f.attack}/{eps_name(f.eps)}/{f.metric}": f.value for f in figures},
                patience_seconds=self._config.track.patience_seconds,
            )
        doubts = tuple(flag["sentence"] for flag in report["flags"] if flag["triggered"])
        seconds = time.monotonic() - began
        return blank.model_copy(update={"figures": figures, "doubts": doubts, "seconds": seconds})

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
        # They are several times as large as the network, and no longer needed.
        ownership.remove(folder, CHECKPOINTS)
        return folder / "model"

    def _surrogate(self, network: Network, track: TrackConfig) -> Path:
        """Return the folder of a ``network`` that is another cell's, trained if it is not there."""
        try:
            return self._trained(network, track)
        except MedsparkError as error:
            raise RunError(f"Its surrogate ({network}) failed: {error}") from error

    def _cell_file(self, network: Network) -> Path:
        evaluate = self._config.evaluate.model_dump(mode="json") | {"attacks": self._attacks()}
        # In grey levels, by which earlier versions named their cells.
        evaluate["eps"] = [255 * eps for eps in self._config.evaluate.eps]
        told = {"network": fingerprint(self._config, network), "evaluate": evaluate}
        others = surrogates(self._config, network)
        if others:
            told["surrogates"] = [fingerprint(self._config, other) for other in others]
        return self._folder / "cells" / f"{digest(told)}.json"

    def _kept(self, network: Network) -> Cell | None:
        """Return the finished cell of ``network`` if there is one; one that failed is not."""
        try:
            text = self._cell_file(network).read_text(encoding="utf-8")
            cell = Cell.model_validate(with_eps(json.loads(text)))
        except (OSError, ValueError):
            return None
        # It may have been found for a table that calls its data by another name.
        named = {"dataset": network.dataset.name}
        return cell.model_copy(update=named) if cell.figures else None

    def _blank(self, network: Network) -> Cell:
        weights = self._config.weights.get(network.model)
        return Cell(
            dataset=network.dataset.name,
            train_images=network.dataset.train_images,
            model=network.model,
            training=network.training,
            weights="random" if weights is None else Path(weights).name,
            seed=network.seed,
        )

    def _attacks(self) -> tuple[AttackName, ...]:
        return tuple(dict.fromkeys(("fgsm", *self._config.evaluate.attacks)))

    def _track(self, parent: str | None) -> TrackConfig:
        return self._config.track.model_copy(update={"parent_run_id": parent, "run_name": None})

    def _write(self) -> dict[str, str]:
        """Write the table as it stands now; return its files."""
        folder = self._folder / "table"
        folder.mkdir(parents=True, exist_ok=True)
        text = markdown(
            self._cells,
            self._columns,
            metric=self._config.metric,
            title="Clean and attacked, undefended and defended",
            facts=self._facts(),
        )
        (folder / "table.md").write_text(text, encoding="utf-8")
        (folder / "table.csv").write_text(csv_text(self._cells), encoding="utf-8")
        figure = paper_figure(self._cells, self._columns, metric=self._config.metric)
        figure.savefig(folder / "table.png", dpi=110)
        names = {"table": "table.md", "csv": "table.csv", "figure": "table.png"}
        return {name: str(folder / file) for name, file in names.items()}

    def _facts(self) -> Mapping[str, str]:
        config, evaluate = self._config, self._config.evaluate
        transfers = "transfer" in evaluate.attacks
        from_others = "; transfer: from the other models' original networks" if transfers else ""
        return {
            "command": f"`{self._command}`",
            "hardware": f"{hardware(self._spark)}; torch {torch.__version__}, "
            f"medspark {__version__}",
            "data": "; ".join(map(self._describe, self._datasets)),
            "training": f"epochs: {config.train.epochs}; batches of {config.train.batch_size}; "
            f"adversarial: {config.train.mode} at {config.attack}; distillation: defensive, "
            f"teacher and student at temperature {config.temperature:g}",
            "attacks": f"{', '.join(self._attacks())}; {evaluate.norm}, {evaluate.steps} steps of "
            f"PGD, random starts: {evaluate.restarts}{from_others}",
            "intervals": f"95 %, {evaluate.bootstrap} bootstrap resamples of the patients",
            "seeds": ", ".join(map(str, config.seeds)),
        }

    def _describe(self, dataset: Dataset) -> str:
        manifest, evaluate = dataset.manifest, self._config.evaluate
        split = manifest.splits[evaluate.split]
        attacked = min(split.rows, evaluate.images or split.rows)
        return (
            f"{dataset.name}: {manifest.height} x {manifest.width} px, {attacked} of {split.rows} "
            f"{evaluate.split} images, {split.patients} patients in them, digest "
            f"{manifest.digest[:12]}"
        )


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _named(track: TrackConfig, name: str) -> TrackConfig:
    return track.model_copy(update={"run_name": name})
