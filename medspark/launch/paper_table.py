"""The paper's experiment: networks x datasets x trainings, each attacked, as one table."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from pyspark.sql import SparkSession

from medspark import __version__
from medspark.attacks.suite import AttackName
from medspark.attacks.threat import ThreatModel
from medspark.config import Config
from medspark.data.petastorm import check_petastorm
from medspark.data.source import DataConfig
from medspark.errors import MedsparkError, RunError, UsageError
from medspark.evaluate.paper_figure import paper_figure
from medspark.evaluate.paper_table import (
    Cell,
    Column,
    MetricName,
    columns,
    csv_text,
    markdown,
    measured,
    seconds_left,
)
from medspark.evaluate.robust import EvaluateConfig, check_attacks
from medspark.ingest.session import SparkConfig, spark_session
from medspark.job import JobConfig, write_result
from medspark.launch.demo import DemoConfig, demo_shards
from medspark.launch.distributor import SPARK_SETTINGS, LaunchConfig, check_room
from medspark.launch.evaluation import (
    Evaluation,
    EvaluationConfig,
    GreyLevels,
    Scrutiny,
    positive_class,
)
from medspark.launch.hardware import hardware
from medspark.launch.training import TrainAtConfig, train_once
from medspark.models.backbones import PRETRAINED, ModelConfig, check_model
from medspark.shards.manifest import Manifest, read_manifest, verify
from medspark.shards.subset import training_share
from medspark.track.runs import TrackConfig, tracked
from medspark.track.spool import DatasetEntry, RunEntry
from medspark.train.adversarial import MODES
from medspark.train.config import TrainConfig
from medspark.train.distill import DistillConfig

__all__ = ["PaperTableConfig", "paper_table"]

logger = logging.getLogger(__name__)

TrainingName = Literal["original", "adversarial", "distillation", "robust_distillation"]
_TEACHER = "teacher"


class PhantomSets(Config):
    """Built-in synthetic data as datasets of the table."""

    counts: tuple[int, ...] = Field(
        (), description="images of each, one dataset for every number; separated by commas"
    )
    image_size: int = Field(64, ge=16, description="height and width, in pixels")
    seed: int = Field(0, description="of the synthetic archives")
    folder: Path = Field(Path("build/demo"), description="where archives, samples and shards go")


class TableScrutiny(Scrutiny):
    """What every network of the table is attacked with; fgsm is always among the attacks."""

    attacks: tuple[AttackName, ...] = Field(
        ("fgsm", "pgd", "pgd_margin"),
        description="what the worst case is taken over, separated by commas; autoattack is the "
        "strongest and the slowest",
    )
    eps: tuple[GreyLevels, ...] = Field(
        (2,), min_length=1, description="budgets in grey levels of 255, separated by commas"
    )
    steps: int = Field(10, ge=1, description="steps of PGD; APGD takes five times as many")


class PaperTableConfig(JobConfig):
    """The paper's table. What is done already is kept in ``folder`` and not done again."""

    datasets: dict[str, Path] = Field(
        {}, description="folders that jobs/shard.py wrote, by name: --datasets.NAME FOLDER"
    )
    phantom: PhantomSets = PhantomSets()
    data_share: tuple[float, ...] = Field(
        (1.0,), description="shares of the training images, a row for each; separated by commas"
    )
    models: tuple[str, ...] = Field(
        ("densenet121", "mobilenetv2_100", "resnet50"), min_length=1, description="timm model names"
    )
    weights: dict[str, str] = Field(
        {},
        description="first weights by model, 'pretrained' or a .safetensors file, random where "
        "none are given: --weights.resnet50 FILE",
    )
    trainings: tuple[TrainingName, ...] = Field(
        ("original", "adversarial", "distillation"),
        min_length=1,
        description="distillation is the defensive one of Papernot et al. 2016; "
        "robust_distillation learns from the adversarially trained network",
    )
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="separated by commas")
    attack: ThreatModel = ThreatModel()
    train: TrainConfig = Field(
        TrainConfig(), description="mode is that of adversarial training; the rest is for all"
    )
    temperature: float = Field(50.0, gt=0, description="of defensive distillation")
    robust_method: Literal["ard", "rslad"] = Field(
        "rslad", description="how robust_distillation learns"
    )
    evaluate: TableScrutiny = TableScrutiny()
    metric: MetricName = Field("accuracy", description="figure that table and picture show")
    data: DataConfig = DataConfig()
    folder: Path = Field(
        Path("build/paper_table"),
        description="for networks, finished cells and the table; all machines see it",
    )
    launch: LaunchConfig = LaunchConfig()
    spark: SparkConfig = SparkConfig()
    track: TrackConfig = TrackConfig()


def paper_table(config: PaperTableConfig, *, command: str) -> dict[str, Any]:
    """Fill the table, write it after every cell, and return the result document.

    Raises UsageError, before Spark starts, for whatever is wrong with the configuration or the
    data, and RunError at the end if cells have failed; the others are kept.
    """
    check(config)
    settings = SPARK_SETTINGS | config.spark.settings
    spark_config = config.spark.model_copy(update={"settings": settings})
    with spark_session(spark_config, name="medspark paper table") as spark:
        return _Table(config, spark, command).fill()


def check(config: PaperTableConfig) -> None:
    """Raise UsageError for what can be found wrong before Spark starts."""
    check_room(config.launch, config.spark.master)
    if config.data.reader == "petastorm":
        check_petastorm()
    if not config.datasets and not config.phantom.counts:
        raise UsageError("There are no datasets: give --datasets.NAME FOLDER or --phantom.counts.")
    if any(count < 10 for count in config.phantom.counts):
        raise UsageError("phantom.counts: a synthetic archive has at least 10 images.")
    if not config.data_share or not all(0 < share <= 1 for share in config.data_share):
        raise UsageError("data_share: shares are above 0 and at most 1.")
    for name, values in _lists(config).items():
        if len(set(values)) < len(values):
            raise UsageError(f"{name}: {', '.join(map(str, values))} names one of them twice.")
    for name in config.weights:
        if name not in config.models:
            raise UsageError(
                f"weights.{name}: the models of this table are {', '.join(config.models)}."
            )
    for name in config.models:
        check_model(ModelConfig(name=name, weights=config.weights.get(name)))
    if "adversarial" in config.trainings and not MODES[config.train.mode].attacks:
        raise UsageError(f"train.mode: {config.train.mode} is no adversarial training.")
    check_attacks(config.evaluate.attacks, gradients=True, surrogates=0)
    for folder in config.datasets.values():
        _check_data(folder, config.evaluate)


def _lists(config: PaperTableConfig) -> dict[str, tuple[Any, ...]]:
    return {
        "models": config.models,
        "trainings": config.trainings,
        "seeds": config.seeds,
        "data_share": config.data_share,
        "phantom.counts": config.phantom.counts,
    }


def _check_data(folder: Path, scrutiny: Scrutiny) -> None:
    manifest = read_manifest(folder)
    verify(folder, manifest, contents=False)
    for split in ("train", scrutiny.split):
        if split not in manifest.splits or manifest.splits[split].rows == 0:
            raise UsageError(f"The shards in {folder} have no {split} images.")
    positive_class(scrutiny.positive, manifest.classes)


@dataclass(frozen=True)
class _Dataset:
    name: str
    folder: Path
    manifest: Manifest


@dataclass(frozen=True)
class _Network:
    """One network to be trained: on what, how, from which seed, and taught by whom."""

    dataset: _Dataset
    model: str
    training: str
    seed: int
    teacher: _Network | None = None

    def __str__(self) -> str:
        return f"{self.model}, {self.training}, on {self.dataset.name}, seed {self.seed}"


# Who teaches the networks that learn from another one of the same architecture.
_TEACHERS = {"distillation": _TEACHER, "robust_distillation": "adversarial"}


def _network(dataset: _Dataset, model: str, training: str, seed: int) -> _Network:
    teacher = _TEACHERS.get(training)
    taught_by = None if teacher is None else _network(dataset, model, teacher, seed)
    return _Network(dataset, model, training, seed, taught_by)


class _Table:
    """One table: which cells there are, which are done, and how the others come about."""

    def __init__(self, config: PaperTableConfig, spark: SparkSession, command: str) -> None:
        self._config = config
        self._spark = spark
        self._command = command
        self._folder = config.folder.resolve()
        self._datasets = list(self._find_datasets())
        self._networks = list(self._plan())
        self._cells = [self._kept(network) or self._blank(network) for network in self._networks]
        self._columns: list[Column] = columns(config.evaluate.eps)

    def fill(self) -> dict[str, Any]:
        """Do the cells that are missing and return the result document."""
        entry = RunEntry(
            name="paper table",
            config=self._config.model_dump(mode="json"),
            tags={"medspark.job": "paper_table"},
        )
        with tracked(self._folder / "mlflow", self._config.track, entry) as run:
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

    def _find_datasets(self) -> Iterator[_Dataset]:
        for name, folder in self._sources():
            for share in self._config.data_share:
                part = training_share(folder, self._folder / "data", share=share)
                title = name if share == 1 else f"{name} {100 * share:g} %"
                yield _Dataset(title, part, read_manifest(part))

    def _sources(self) -> Iterator[tuple[str, Path]]:
        for name, folder in self._config.datasets.items():
            yield name, folder.resolve()
        phantom = self._config.phantom
        for count in phantom.counts:
            demo = DemoConfig(
                folder=phantom.folder,
                count=count,
                image_size=phantom.image_size,
                seed=phantom.seed,
            )
            yield f"phantom {count}", demo_shards(self._spark, demo)[0].resolve()

    def _plan(self) -> Iterator[_Network]:
        for dataset in self._datasets:
            for model in self._config.models:
                for training in self._config.trainings:
                    for seed in self._config.seeds:
                        yield _network(dataset, model, training, seed)

    def _tell(self, number: int) -> None:
        pending = [cell for cell in self._cells[number:] if not cell.figures]
        left = seconds_left(pending, [cell for cell in self._cells if cell.figures])
        about = "" if left is None else f"; about {left / 60:.0f} minutes left"
        network = self._networks[number]
        logger.info("cell %d of %d: %s%s", number + 1, len(self._cells), network, about)

    def _do(self, number: int, *, parent: str | None) -> Cell:
        network, blank = self._networks[number], self._blank(self._networks[number])
        try:
            cell = self._train_and_attack(network, blank, parent)
        except MedsparkError as error:
            first, *_ = str(error).splitlines()
            logger.warning("cell %d of %d failed: %s", number + 1, len(self._cells), error)
            cell = blank.model_copy(update={"failure": first})
        self._cell_file(network).parent.mkdir(parents=True, exist_ok=True)
        write_result(self._cell_file(network), cell.model_dump(mode="json"))
        return cell

    def _train_and_attack(self, network: _Network, blank: Cell, parent: str | None) -> Cell:
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
        track = self._track(parent)
        with tracked(self._cell_file(network).with_suffix(".mlflow"), track, entry) as run:
            below = self._track(run.reference["run_id"])
            model = self._trained(network, below)
            scrutiny = self._config.evaluate.model_dump() | {"attacks": self._attacks()}
            report = Evaluation(
                EvaluationConfig(
                    **scrutiny,
                    model=str(model),
                    shards=network.dataset.folder,
                    folder=self._folder / "evaluations",
                    track=below,
                )
            ).run(self._spark)
            figures = measured(report)
            run.end(
                "FINISHED",
                summary={f"{f.attack}/eps_{f.eps_255:g}/{f.metric}": f.value for f in figures},
                patience_seconds=self._config.track.patience_seconds,
            )
        doubts = tuple(flag["sentence"] for flag in report["flags"] if flag["triggered"])
        seconds = time.monotonic() - began
        return blank.model_copy(update={"figures": figures, "doubts": doubts, "seconds": seconds})

    def _trained(self, network: _Network, track: TrackConfig) -> Path:
        """Return the folder of the trained ``network``, trained if it is not there."""
        folder = self._folder / "networks" / self._fingerprint(network)
        if (folder / "trained.json").is_file():
            return folder / "model"
        config = self._training_of(network).model_copy(
            update={"run_dir": folder, "shards": network.dataset.folder, "track": track}
        )
        if network.teacher is not None:
            taught_by = self._trained(network.teacher, track)
            config = config.model_copy(update={"distill": self._distillation(network, taught_by)})
        logger.info("training %s", network)
        result = train_once(config, self._spark, folder)
        write_result(folder / "trained.json", result)
        # They are several times as large as the network, and no longer needed.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return folder / "model"

    def _training_of(self, network: _Network) -> _NetworkConfig:
        train = self._config.train
        if network.training != "adversarial":
            plain: dict[str, Any] = {"mode": "standard", "dual_bn": False, "gradalign": 0.0}
            train = train.model_copy(update=plain)
        if network.training == _TEACHER:
            # It learns at the temperature that it teaches at (Papernot et al. 2016, section IV).
            train = train.model_copy(update={"temperature": self._config.temperature})
        return _NetworkConfig(
            model=ModelConfig(name=network.model, weights=self._config.weights.get(network.model)),
            attack=self._config.attack,
            train=train,
            data=self._config.data,
            evaluate=EvaluateConfig(attacks=(), eps=()),  # what is attacked is the cell, later
            seed=network.seed,
            resume="auto",
            launch=self._config.launch,
        )

    def _distillation(self, network: _Network, teacher: Path) -> DistillConfig:
        if network.training == "distillation":
            heat = self._config.temperature
            return DistillConfig(teacher=teacher, method="defensive", temperature=heat)
        return DistillConfig(teacher=teacher, method=self._config.robust_method)

    def _fingerprint(self, network: _Network) -> str:
        """Return what tells this network from others: data, recipe, seed, teacher; no paths."""
        config = self._training_of(network)
        told: dict[str, Any] = config.model_dump(mode="json", include={"attack", "train", "seed"})
        told["data"] = config.data.model_dump(mode="json", include={"reader", "augment", "window"})
        told["dataset"] = network.dataset.manifest.digest
        told["model"] = [network.model, _contents(config.model.weights)]
        if network.teacher is not None:
            told["distill"] = self._distillation(network, Path()).model_dump(mode="json")
            told["teacher"] = self._fingerprint(network.teacher)
        return _digest(told)

    def _cell_file(self, network: _Network) -> Path:
        scrutiny = self._config.evaluate.model_dump(mode="json") | {"attacks": self._attacks()}
        told = {"network": self._fingerprint(network), "evaluate": scrutiny}
        return self._folder / "cells" / f"{_digest(told)}.json"

    def _kept(self, network: _Network) -> Cell | None:
        """Return the finished cell of ``network`` if there is one; one that failed is not."""
        try:
            text = self._cell_file(network).read_text(encoding="utf-8")
            cell = Cell.model_validate_json(text)
        except (OSError, ValidationError):
            return None
        # It may have been found for a table that calls its data by another name.
        named = {"dataset": network.dataset.name}
        return cell.model_copy(update=named) if cell.figures else None

    def _blank(self, network: _Network) -> Cell:
        weights = self._config.weights.get(network.model)
        return Cell(
            dataset=network.dataset.name,
            train_images=network.dataset.manifest.splits["train"].rows,
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
        config, scrutiny = self._config, self._config.evaluate
        return {
            "command": f"`{self._command}`",
            "hardware": f"{hardware(self._spark)}; torch {torch.__version__}, "
            f"medspark {__version__}",
            "data": "; ".join(map(self._describe, self._datasets)),
            "training": f"{config.train.epochs} epochs, batches of {config.train.batch_size}; "
            f"adversarial: {config.train.mode} at {config.attack}; distillation: defensive, "
            f"teacher and student at temperature {config.temperature:g}",
            "attacks": f"{', '.join(self._attacks())}; {scrutiny.norm}, {scrutiny.steps} steps of "
            f"PGD, {scrutiny.restarts} random start(s)",
            "intervals": f"95 %, {scrutiny.bootstrap} bootstrap resamples of the patients",
            "seeds": ", ".join(map(str, config.seeds)),
        }

    def _describe(self, dataset: _Dataset) -> str:
        manifest, scrutiny = dataset.manifest, self._config.evaluate
        split = manifest.splits[scrutiny.split]
        attacked = min(split.rows, scrutiny.images or split.rows)
        return (
            f"{dataset.name}: {manifest.height} x {manifest.width} px, {attacked} of {split.rows} "
            f"{scrutiny.split} images, {split.patients} patients in them, digest "
            f"{manifest.digest[:12]}"
        )


class _NetworkConfig(TrainAtConfig):
    distill: DistillConfig | None = None


def _contents(weights: str | None) -> str | None:
    if weights in (None, PRETRAINED):
        return weights
    return hashlib.sha256(Path(str(weights)).read_bytes()).hexdigest()


def _digest(told: Mapping[str, Any]) -> str:
    text = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
