"""Fill the backdoor table: adversaries x aggregation rules, and the ablation on tail images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medspark import __version__
from medspark.federate.edge import edge_set
from medspark.federate.folder import write_array
from medspark.federate.weights import Weights
from medspark.job import write_result
from medspark.launch.hardware import hardware
from medspark.shards.manifest import read_manifest
from medspark.spark.session import spark_session
from medspark.study.backdoor_figure import ablation_figure, success_figure
from medspark.study.backdoor_report import (
    BackdoorCell,
    Point,
    csv_text,
    differs,
    markdown,
    page,
)
from medspark.study.cells import Cell, Study, StudyReport, held_study, run_study
from medspark.track.config import TrackConfig
from medspark.track.journal import Journal
from medspark.track.runs import TrackedRun, tracked
from medspark.track.spool import DatasetEntry, RunEntry
from medspark.workflows.backdoor_cell import Images, Outcome, run_federation, weights_after
from medspark.workflows.backdoor_plan import (
    BackdoorTableConfig,
    Federation,
    ablation,
    check,
    check_shards,
    federation_of,
    fingerprint,
    screened,
    table,
    usable,
    warm_up,
    warm_up_name,
)
from medspark.workflows.demo import demo_shards

__all__ = ["backdoor_table"]

TITLE = "Backdoors in a federation"


def backdoor_table(config: BackdoorTableConfig, *, command: str) -> dict[str, Any]:
    """Fill the table, write it after every cell, and return the result document.

    Raises UsageError, before Spark starts, for an error in the configuration or the data, and
    RunError at the end if cells have failed. The finished cells are kept and reported.
    """
    check(config)
    with (
        held_study(config.folder),
        spark_session(config.spark, name="medspark backdoor table") as spark,
    ):
        if config.shards is None:
            shards, _ = demo_shards(spark, config.demo)
            check_shards(config, shards)
            config = config.model_copy(update={"shards": shards})
        return Table(config, command=command, machine=hardware(spark)).fill()


class Table:
    """One table: its federations, and its files."""

    def __init__(self, config: BackdoorTableConfig, *, command: str, machine: str) -> None:
        assert config.shards is not None, "the shards are there"
        self._command, self._machine = command, machine
        self._folder = config.folder.resolve()
        self._manifest = read_manifest(config.shards)
        self._config, self._unusable = usable(config, self._manifest)
        self._images = cache(self._images_of)
        self._records: dict[Federation, BackdoorCell] = {}

    def fill(self) -> dict[str, Any]:
        """Run the missing cells and return the result document.

        The first seed's cells tell which rows the other seeds are run for.
        """
        config = self._config
        first, more = list(table(config, config.seeds[0])), list(ablation(config))
        known = [self._cell(one).kept() for one in first]
        if len(config.seeds) == 1 or None in known:
            done = self._study(first, more)
            if len(config.seeds) == 1:
                return done
        seen = [kept or self._records[one] for one, kept in zip(first, known, strict=True)]
        again = [
            one
            for one, cell in zip(first, seen, strict=True)
            if differs(cell, seen, margin=config.margin)
        ]
        return self._study(screened(first, config.seeds[1:], again), more)

    def _study(self, rows: Sequence[Federation], more: Sequence[Federation]) -> dict[str, Any]:
        """Run a study of the federations in the table, and of those in the ablation."""
        every = list(dict.fromkeys([*rows, *more]))

        def write(records: Sequence[BackdoorCell], _run: TrackedRun | None = None) -> StudyReport:
            self._records = dict(zip(every, records, strict=True))
            return self._write(rows, more)

        return run_study(
            Study(
                cells=[self._cell(one) for one in every],
                report=write,
                entry=RunEntry(
                    name="backdoor table",
                    config=self._config.model_dump(mode="json"),
                    tags={"medspark.job": "backdoor_table"},
                ),
                track=self._config.track,
                spool=self._folder / "mlflow",
                after_each=write,
            )
        )

    def _cell(self, one: Federation) -> Cell[BackdoorCell]:
        blank = BackdoorCell(
            adversary=one.adversary, rule=one.rule, seed=one.seed, honest_edge=one.honest_edge
        )
        name = fingerprint(self._config, one, self._manifest)
        file = self._folder / "cells" / f"{name}.json"
        work = partial(self._run, one, blank, file)
        return Cell(str(one), blank, file, work, alike=(one.adversary, one.rule))

    def _run(
        self, one: Federation, blank: BackdoorCell, file: Path, parent_run_id: str | None
    ) -> BackdoorCell:
        entry = RunEntry(
            name=str(one),
            config={"adversary": one.adversary, "rule": one.rule, "seed": one.seed},
            tags={"medspark.job": "backdoor_table", "medspark.adversary": one.adversary},
            dataset=DatasetEntry(
                name="shards", digest=self._manifest.digest, source=str(self._config.shards)
            ),
        )
        with tracked(file.with_suffix(".mlflow"), self._track(parent_run_id), entry) as run:
            with Journal(run.spool.journal) as journal:

                def seen(point: Point) -> None:
                    figures = {"main": point.main, "success": point.success}
                    known = {name: value for name, value in figures.items() if value is not None}
                    journal.record(point.round, known)

                outcome = run_federation(
                    federation_of(self._config, one),
                    self._images(one.seed),
                    self._config.evaluate,
                    self._folder / "federation",
                    first=self._first(one.seed),
                    averaged=self._config.averaged,
                    seen=seen,
                )
            found = _figures(outcome)
            summary = {name: value for name, value in found.items() if value is not None}
            run.end(
                "FINISHED", summary=summary, patience_seconds=self._config.track.patience_seconds
            )
        flags = outcome.report.triggered_flags
        return blank.model_copy(update={**found, "curve": outcome.curve, "flags": flags})

    def _images_of(self, seed: int) -> Images:
        shards, adversary = self._config.shards, self._config.adversary
        assert shards is not None, "the shards are there"
        edge = edge_set(adversary, self._manifest, seed=seed)
        return Images(shards, self._manifest, edge)

    def _first(self, seed: int) -> Weights | None:
        """Return the weights that the cells of a seed start from; they are trained once."""
        if self._config.warm_up == 0:
            return None
        name = warm_up_name(self._config, seed, self._manifest)
        file = self._folder / "warm-up" / f"{name}.npy"
        if not file.exists():
            chosen = warm_up(self._config, seed)
            file.parent.mkdir(exist_ok=True)
            write_array(
                file, weights_after(chosen, self._images(seed), self._folder / "federation")
            )
        weights: Weights = np.load(file, allow_pickle=False)
        return weights

    def _track(self, parent: str | None) -> TrackConfig:
        return self._config.track.model_copy(
            update={"parent_run_id": parent, "run_name": None, "system_metrics": False}
        )

    def _write(self, rows: Iterable[Federation], more: Iterable[Federation]) -> StudyReport:
        """Write the table with the cells finished so far."""
        folder = self._folder / "table"
        folder.mkdir(parents=True, exist_ok=True)
        cells = [self._records[one] for one in rows]
        shared = [self._records[one] for one in more]
        success_figure(cells, stopped=self._config.rounds).savefig(folder / "success.png", dpi=110)
        tables, pictures = {"Adversaries and rules": cells}, ["success.png"]
        if shared:
            ablation_figure(shared).savefig(folder / "ablation.png", dpi=110)
            tables["Honest clients that hold tail images"] = shared
            pictures.append("ablation.png")
        about: dict[str, Any] = {
            "later": self._config.later,
            "averaged": self._config.averaged,
            "title": TITLE,
            "facts": self._facts(),
            "pictures": pictures,
        }
        every = list(self._records.values())
        (folder / "table.md").write_text(markdown(tables, **about), encoding="utf-8")
        (folder / "table.html").write_text(page(tables, **about), encoding="utf-8")
        (folder / "table.csv").write_text(csv_text(every), encoding="utf-8")
        write_result(folder / "curves.json", {"cells": [c.model_dump(mode="json") for c in every]})
        names = ["table.md", "table.html", "table.csv", *pictures]
        files = {name.replace(".", "_"): str(folder / name) for name in names}
        return StudyReport(page=folder / "table.html", document=files)

    def _facts(self) -> Mapping[str, str]:
        config, manifest = self._config, self._manifest
        clients, attack, test = config.clients, config.adversary, config.evaluate
        named = f"clients {', '.join(map(str, attack.clients))}"
        liars = named if attack.clients else f"{100 * attack.share:g} % of the clients"
        if attack.per_round is not None:
            liars += f", {attack.per_round} in every attacked round"
        return {
            "command": f"`{self._command}`",
            "hardware": f"{self._machine}; torch {torch.__version__}, medspark {__version__}",
            "data": f"{manifest.height} x {manifest.width} px, {manifest.splits['train'].rows} "
            f"training and {manifest.splits['test'].rows} test images, digest "
            f"{manifest.digest[:12]}",
            "clients": f"{clients.count or 'all'} by {clients.by}, "
            f"{clients.per_round or 'all'} in a round; malicious: {liars}",
            "rounds": f"{config.warm_up} passes over all training images, then {config.rounds} "
            f"attacked rounds and {config.later} without an attack",
            "training": f"{config.model.name}, {config.local.train.mode}, {config.local.epochs} "
            f"passes in batches of {config.local.batch_size}, {config.local.optimiser} at "
            f"{config.local.lr:g}",
            "settings": "; ".join(_settings(config)) or "the defaults",
            **self._left_out(),
            "attacks on images": f"{', '.join(test.attacks)}; {test.norm}, {test.steps} steps, "
            f"{test.images or 'all'} test images",
            "seeds": ", ".join(map(str, config.seeds)),
        }

    def _left_out(self) -> dict[str, str]:
        """Return the facts about rules and cells that the table does without."""
        once = [
            name
            for name in self._config.adversaries
            if not self._config.adversary.model_copy(update={"name": name}).adversary.reaches_rules
        ]
        told = {"rules left out": " ".join(self._unusable.values())}
        if once:
            told["one cell"] = (
                f"{', '.join(once)} has a cell with one rule alone, because the server leaves such "
                "updates out before any rule sees them"
            )
        return {name: text for name, text in told.items() if text}


def _settings(config: BackdoorTableConfig) -> list[str]:
    """Return the settings of the table's adversaries and rules that differ from the defaults."""
    changed = config.adversary.model_dump(mode="json", exclude_defaults=True)
    shown: dict[str, dict[str, Any]] = {
        name: changed[name] for name in config.adversaries if name in changed
    }
    shown |= {rule: config.settings_of(rule) for rule in config.rules}
    return [
        f"{name}.{key} {value}" for name, chosen in shown.items() for key, value in chosen.items()
    ]


def _figures(outcome: Outcome) -> dict[str, float | None]:
    worst = outcome.report.worst_case
    return {
        "main": outcome.report.clean.accuracy,
        "worst": worst[-1].accuracy if worst else None,
        "success": outcome.success,
        "lasting": outcome.later,
        "tpr": outcome.detection.tpr,
        "fpr": outcome.detection.fpr,
        "aggregation_seconds": outcome.aggregation_seconds,
    }
