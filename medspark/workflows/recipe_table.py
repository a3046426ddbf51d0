"""Compare recipes of training at equal time: screen all, choose on validation images, test once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyspark.sql import SparkSession

from medspark import __version__, ownership
from medspark.documents import parse_json, read_regular
from medspark.eps import eps_text
from medspark.evaluate.result import metrics_by_name
from medspark.job import write_result
from medspark.launch.distributor import SPARK_SETTINGS
from medspark.launch.hardware import hardware
from medspark.shards.manifest import read_manifest
from medspark.spark.session import spark_session
from medspark.study.cells import Cell, Study, StudyReport, digest, held_study, run_study
from medspark.study.recipe_figure import recipe_figure
from medspark.study.recipe_report import (
    RecipeCell,
    RecipeEntry,
    RecipeTableResult,
    csv_text,
    markdown,
)
from medspark.track.config import TrackConfig
from medspark.track.runs import tracked
from medspark.track.spool import DatasetEntry, RunEntry
from medspark.train.result import TrainResult
from medspark.train.run_folder import CHECKPOINTS
from medspark.workflows.evaluate import Evaluation
from medspark.workflows.evaluate_config import EvaluationConfig, EvaluationSettings
from medspark.workflows.recipe_choice import best
from medspark.workflows.recipe_config import (
    RecipeTableConfig,
    RecipeTraining,
    changes,
    check_recipes,
    fingerprint,
    recipe_names,
    training_of,
)
from medspark.workflows.recipe_plan import (
    chosen_finalists,
    epochs_of,
    final_cells,
    final_standings,
    repeated_cells,
    screened_cells,
    screened_standings,
    timed_cells,
)
from medspark.workflows.train_at import train_once

__all__ = ["recipe_table"]

logger = logging.getLogger(__name__)

# A calibration times steps. It validates as little as possible, and records every second step, so
# that the first ones, in which kernels are chosen, do not count.
_CALIBRATION = {"validation_images": 1, "validation_steps": 1, "log_every": 2}


def recipe_table(config: RecipeTableConfig, *, command: str) -> RecipeTableResult:
    """Fill the table, write it after every cell, and return the result document.

    Raises UsageError, before Spark starts, for an error in the configuration or the data, and
    RunError at the end if cells have failed. The finished cells are kept and reported.
    """
    check_recipes(config)
    settings = SPARK_SETTINGS | config.spark.settings
    spark_config = config.spark.model_copy(update={"settings": settings})
    with (
        held_study(config.folder),
        spark_session(spark_config, name="medspark recipe table") as spark,
    ):
        return _Table(config, spark, command).fill()


class _Table:
    """One table: its trainings and evaluations, and its files."""

    def __init__(self, config: RecipeTableConfig, spark: SparkSession, command: str) -> None:
        self._config, self._spark, self._command = config, spark, command
        self._folder = config.folder.resolve()
        self._shards = {name: folder.resolve() for name, folder in config.shards.items()}
        self._manifests = {name: read_manifest(folder) for name, folder in self._shards.items()}

    def fill(self) -> RecipeTableResult:
        """Run the missing cells of all stages and return the result document."""
        entry = RunEntry(
            name="recipe table",
            config=self._config.model_dump(mode="json"),
            tags={"medspark.job": "recipe_table"},
        )
        study = Study(
            cells=self.cells(timed_cells(self._config)),
            report=lambda records, _: self._write(records),
            entry=entry,
            # The trainings and evaluations below record processor and memory.
            track=self._config.track.model_copy(update={"system_metrics": False}),
            spool=self._folder / "mlflow",
            after_each=self._write,
            then=[self._stage(plan) for plan in (screened_cells, repeated_cells, final_cells)],
        )
        return RecipeTableResult.model_validate(run_study(study))

    def _stage(
        self, plan: Callable[[RecipeTableConfig, Sequence[RecipeCell]], list[RecipeCell]]
    ) -> Callable[[Sequence[RecipeCell]], list[Cell[RecipeCell]]]:
        return lambda records: self.cells(plan(self._config, records))

    def cells(self, blanks: Sequence[RecipeCell]) -> list[Cell[RecipeCell]]:
        """Return the cells that fill the records ``blanks``."""
        return [self._cell(blank) for blank in blanks]

    def _cell(self, blank: RecipeCell) -> Cell[RecipeCell]:
        training, manifest = self._training(blank), self._manifests[blank.dataset]
        network = fingerprint(self._config, training, dataset=manifest.digest)
        decisive: dict[str, Any] = {"stage": blank.stage, "network": network}
        if blank.stage != "calibration":
            decisive["evaluate"] = self._settings(blank).model_dump(mode="json")
        file = self._folder / "cells" / f"{digest(decisive)}.json"
        work = self._calibrate if blank.stage == "calibration" else self._train_and_attack
        return Cell(
            name=f"{blank.stage} of {blank.recipe} on {blank.dataset}, seed {blank.seed}",
            blank=blank,
            file=file,
            work=partial(work, blank, training, self._folder / "networks" / network, file),
            size=blank.steps or 1,
            alike=(blank.stage, blank.dataset, blank.recipe),
        )

    def _training(self, blank: RecipeCell) -> RecipeTraining:
        training = training_of(self._config, blank.recipe, seed=blank.seed, steps=blank.steps)
        if blank.stage != "calibration":
            return training
        monitor = training.train.monitor.model_copy(update={"action": "off"})
        short = training.train.model_copy(update=_CALIBRATION | {"monitor": monitor})
        return training.model_copy(update={"train": short})

    def _settings(self, blank: RecipeCell) -> EvaluationSettings:
        return self._config.evaluate if blank.stage == "test" else self._config.screen

    def _calibrate(
        self,
        blank: RecipeCell,
        training: RecipeTraining,
        folder: Path,
        _file: Path,
        parent_run_id: str | None,
    ) -> RecipeCell:
        named = {"parent_run_id": parent_run_id, "run_name": f"time {blank.recipe}"}
        track = self._config.track.model_copy(update=named)
        result = self._trained(blank, training, folder, track)
        ownership.remove(folder, ["model"])  # nobody needs the network
        return blank.model_copy(update=_times(result))

    def _train_and_attack(
        self,
        blank: RecipeCell,
        training: RecipeTraining,
        folder: Path,
        file: Path,
        parent_run_id: str | None,
    ) -> RecipeCell:
        shards, manifest = self._shards[blank.dataset], self._manifests[blank.dataset]
        name = f"{blank.stage} {blank.recipe} on {blank.dataset}, seed {blank.seed}"
        entry = RunEntry(
            name=name,
            config={"recipe": blank.recipe, **changes(self._config, blank.recipe)},
            params={"seed": blank.seed, "steps": blank.steps},
            tags={"medspark.job": "recipe_table", "medspark.recipe": blank.recipe},
            dataset=DatasetEntry(name=blank.dataset, digest=manifest.digest, source=str(shards)),
        )
        track = self._config.track.model_copy(
            update={"parent_run_id": parent_run_id, "run_name": None, "system_metrics": False}
        )
        settings = self._settings(blank)
        with tracked(file.with_suffix(".mlflow"), track, entry) as run:
            own = self._config.track.model_copy(
                update={"parent_run_id": run.reference["run_id"], "run_name": None}
            )
            trained = self._trained(blank, training, folder, _named(own, f"train {blank.recipe}"))
            evaluation = Evaluation(
                EvaluationConfig(
                    **settings.model_dump(),
                    model=str(folder / "model"),
                    shards=shards,
                    folder=self._folder / "evaluations",
                    track=_named(own, f"attack {blank.recipe}"),
                )
            )
            result = evaluation.run(self._spark)
            figures = result.figures()
            run.end(
                "FINISHED",
                summary=metrics_by_name(figures, prefix=f"{settings.split}/"),
                patience_seconds=self._config.track.patience_seconds,
            )
        found = {"figures": figures, "flags": result.triggered_flags}
        return blank.model_copy(update=_times(trained) | found)

    def _trained(
        self, blank: RecipeCell, training: RecipeTraining, folder: Path, track: TrackConfig
    ) -> TrainResult:
        """Return the result of a training, from an earlier cell or a new one."""
        kept = folder / "trained.json"
        if kept.is_file():
            return TrainResult.model_validate(parse_json(read_regular(kept)))
        folder.mkdir(parents=True, exist_ok=True)
        config = training.model_copy(
            update={"run_dir": folder, "shards": self._shards[blank.dataset], "track": track}
        )
        # One test image was looked at, which says nothing about the network: only speed is kept.
        result = train_once(config, self._spark, folder, timed_only=True)
        write_result(kept, result.as_json())
        # Checkpoints are several times as large as the network, and no longer needed.
        ownership.remove(folder, CHECKPOINTS)
        return result

    def _write(self, records: Sequence[RecipeCell]) -> StudyReport:
        """Write the table with the cells finished so far."""
        config, folder = self._config, self._folder / "table"
        folder.mkdir(parents=True, exist_ok=True)
        recipes = [
            RecipeEntry(name=name, changes=changes(config, name)) for name in recipe_names(config)
        ]
        screened, chosen_few = (
            screened_standings(config, records),
            chosen_finalists(config, records),
        )
        last = final_standings(config, records)
        text = markdown(
            records,
            recipes=recipes,
            screened=screened,
            finalists=chosen_few,
            standings=last,
            chosen=best(last),
            facts=self._facts(),
        )
        (folder / "recipes.md").write_text(text, encoding="utf-8")
        (folder / "recipes.csv").write_text(csv_text(records), encoding="utf-8")
        recipe_figure(records, eps=config.attack.eps).savefig(folder / "recipes.png", dpi=110)
        names = {"table": "recipes.md", "csv": "recipes.csv", "figure": "recipes.png"}
        document = {name: str(folder / file) for name, file in names.items()} | {
            "recipes": [each.as_json() for each in recipes],
            "screened": [each.as_json() for each in screened],
            "finalists": list(chosen_few),
            "standings": [each.as_json() for each in last],
            "chosen": best(last),
        }
        tags = {"medspark.chosen": best(last) or "none"}
        return StudyReport(page=folder / "recipes.md", document=document, tags=tags)

    def _facts(self) -> Mapping[str, str]:
        config, screen, test = self._config, self._config.screen, self._config.evaluate
        time = (
            f"{config.seconds:g} s for every recipe"
            if config.seconds is not None
            else f"what the default needs for {config.train.epochs} epochs on that set"
        )
        return {
            "command": f"`{self._command}`",
            "hardware": f"{hardware(self._spark)}; torch {torch.__version__}, "
            f"medspark {__version__}",
            "data": "; ".join(self._describe(name) for name in self._shards),
            "training": f"{config.model.name}, {config.train.mode} at {config.attack}, batches of "
            f"{config.train.batch_size}",
            "time": f"{time}; numbers of steps planned from {config.calibration_steps} timed steps",
            "choice": f"worst-case {config.criterion.replace('_', ' ')} at "
            f"{eps_text(config.attack.eps)} on validation images, mean over the sets; no flag; "
            f"clean AUROC at most {config.margin:g} below the default's on every set",
            "validation": f"{', '.join(screen.attacks)}; {screen.steps} steps of PGD",
            "test": f"{', '.join(test.attacks)}; {test.steps} steps of PGD",
            "seeds": f"{', '.join(map(str, config.seeds))}; screening by the first",
        }

    def _describe(self, name: str) -> str:
        manifest, config = self._manifests[name], self._config
        rows = {split: manifest.splits[split].rows for split in ("train", "val", "test")}
        attacked = [
            f"{min(rows[each.split], each.images or rows[each.split])} of {rows[each.split]} "
            f"{each.split}"
            for each in (config.screen, config.evaluate)
        ]
        return (
            f"{name}: {manifest.height} x {manifest.width} px, {rows['train']} training, "
            f"{', '.join(attacked)} images, digest {manifest.digest[:12]}"
        )


def _times(result: TrainResult) -> dict[str, float]:
    """Return what a training took.

    Seconds are steps times the duration of one, so that a training that was interrupted and
    resumed counts as one that was not.
    """
    epochs = epochs_of(result.steps, rows=result.train_images, batch=result.global_batch)
    return {
        "trained_steps": result.steps,
        "epochs": epochs,
        "seconds_per_step": result.seconds_per_step,
        "train_seconds": result.steps * result.seconds_per_step,
    }


def _named(track: TrackConfig, name: str) -> TrackConfig:
    return track.model_copy(update={"run_name": name})
