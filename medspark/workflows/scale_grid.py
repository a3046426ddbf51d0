"""The grid of a sweep: its configuration, its cells, and the training of each cell."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field

from medspark.attacks.config import AttackName
from medspark.attacks.threat import ThreatModel
from medspark.config import Config
from medspark.data.config import DataConfig
from medspark.errors import UsageError
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.sanity import PROBED_IMAGES
from medspark.launch.distributor import LaunchConfig
from medspark.models.config import ModelConfig, check_model
from medspark.models.image_size import check_images
from medspark.remote import AnyPath
from medspark.shards.manifest import Manifest, read_manifest
from medspark.spark.cluster import local_slots
from medspark.spark.slots import submitted_master
from medspark.study.laws import Cluster
from medspark.study.sweep import ALONE, ScalePoint, Scaling
from medspark.train.config import MIXED_MODES, TrainConfig, check_ranks
from medspark.train.config import ModeName as TrainMode
from medspark.workflows.demo import DemoConfig
from medspark.workflows.job_settings import SparkTrainingConfig
from medspark.workflows.train_at import TrainAtConfig, check

__all__ = [
    "ScaleAtConfig", "cells_of", "check_grid", "check_shares", "local_master", "timed_only",
    "training_of",
]  # fmt: skip

_DUAL = "+dual_bn"
_MODES = get_args(TrainMode)


def _known_mode(mode: str) -> str:
    if mode.removesuffix(_DUAL) not in _MODES:
        raise ValueError(f"there is no mode '{mode}'; there are {', '.join(_MODES)}.")
    return mode


ModeName = Annotated[str, AfterValidator(_known_mode)]


class GridConfig(Config):
    """The points of the sweep: every combination of these lists, separated by commas."""

    processes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 2), min_length=1, description="numbers of training processes"
    )
    data: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (1.0,),
        min_length=1,
        description="shares of the training images; a share holds whole patients and contains "
        "every smaller share; the number of epochs stays the same, so smaller shares take fewer "
        "steps",
    )
    model: tuple[str, ...] = Field((), description="timm model names; model.name by default")
    mode: tuple[ModeName, ...] = Field(
        ("standard", "fused_noise"),
        min_length=1,
        description="values of train.mode; MODE+dual_bn trains with two sets of batch norms",
    )
    scaling: tuple[Literal["strong", "weak"], ...] = Field(
        ("strong",),
        min_length=1,
        description="strong: the global batch is fixed; weak: it grows with the number of "
        "processes",
    )
    plain: bool = Field(
        True,
        description="also time a single process without DDP on the largest share: with the whole "
        "batch, and with the batch that each process gets at the largest number of processes",
    )


class TestConfig(Config):
    """The attacks on the network of each cell after its training, with attack.eps."""

    __test__ = False  # tells pytest that this is not a test class

    attacks: tuple[AttackName, ...] = Field(("fgsm", "pgd"), description="names of the attacks")
    steps: int = Field(10, ge=1, description="steps of PGD")
    images: int | None = Field(
        None, ge=1, description="number of test images to attack, always the same; all by default"
    )
    validation_images: int = Field(
        64, ge=1, description="validation images attacked after each epoch"
    )
    at: Literal["all", "largest"] = Field(
        "all",
        description="largest completes only the trainings with the most processes, and times a "
        "few steps of the others, whose networks would differ only in the moving batch-norm "
        "statistics that each process keeps",
    )


class ProjectConfig(Cluster):
    """The sizes to project to, and the assumptions about a cluster that is not measured."""

    nodes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (8, 32, 128, 512, 1024), description="numbers of machines, one process each"
    )
    images: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1e5, 1e6, 1e7, 1e8, 1e9), description="numbers of training images"
    )
    batch: int = Field(32, ge=1, description="images per process in a step")
    largest_batch: int = Field(
        8192, ge=1, description="largest global batch that trains as well as a small one"
    )


class ScaleAtConfig(SparkTrainingConfig):
    """Train at many scales and compare."""

    shards: AnyPath | None = Field(
        None, description="folder that jobs/shard.py wrote; built-in demo data by default"
    )
    folder: Path | None = Field(
        None,
        description="folder of the sweep, shared by all machines; it keeps finished cells, which "
        "are not run again; beside the output by default",
    )
    grid: GridConfig = GridConfig()
    repeats: int = Field(3, ge=1, description="cells per point, each with a different seed")
    compare: tuple[str, ...] = Field(
        (),
        description="run nothing and compare these sweeps: folders of sweeps, or MLflow run ids",
    )
    model: ModelConfig = ModelConfig()
    weights: dict[str, str] = Field(
        {}, description="initial weights by network; model.weights for all other networks"
    )
    attack: ThreatModel = ThreatModel()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    test: TestConfig = TestConfig()
    warmup_steps: int = Field(5, ge=0, description="first steps, left out of the speed")
    timed_steps: int = Field(40, ge=1, description="least number of steps of a timed-only cell")
    seed: int = Field(0, ge=0, description="seed of the first repeat; repeat n uses seed + n")
    project: ProjectConfig = ProjectConfig()
    demo: DemoConfig = DemoConfig()

    @property
    def models(self) -> tuple[str, ...]:
        """The networks of the sweep."""
        return self.grid.model or (self.model.name,)

    @property
    def place(self) -> Path:
        """The folder of the sweep."""
        output = self.output or Path("build/results/scale_at.json")
        return (self.folder or output.with_suffix(".sweep")).resolve()


def check_grid(config: ScaleAtConfig) -> None:
    """Raise UsageError for every mistake in the grid that shows before Spark starts."""
    for model in config.models:
        for mode in config.grid.mode:
            cells = cells_of(config, 1, model=model, mode=mode)
            for each in cells:
                check_ranks(training_of(config, each).train, each.world_size)
            cell = training_of(config, cells[0])
            # The sweep's session has room for all processes, so check with one.
            check(cell.model_copy(update={"launch": LaunchConfig(processes=1)}))
            check_model(cell.model)
            if config.shards is not None:
                check_images(cell.model, read_manifest(config.shards))
            train = cell.train
            if train.dual_bn and train.mode not in MIXED_MODES:
                raise UsageError(f"grid.mode: {mode} learns from one kind of image alone.")
    unknown = set(config.weights) - set(config.models)
    if unknown:
        raise UsageError(f"weights: {', '.join(sorted(unknown))} is no network of this sweep.")
    if config.shards is not None:
        check_shares(config, read_manifest(config.shards))
    master = submitted_master(config.spark.master)
    slots = local_slots(master)
    if slots is not None and config.spark.master and slots < max(config.grid.processes):
        raise UsageError(
            f"grid.processes goes up to {max(config.grid.processes)}, but Spark's master {master} "
            f"has {slots} slots on this machine."
        )


def check_shares(config: ScaleAtConfig, manifest: Manifest) -> None:
    """Raise UsageError if the smallest share has fewer images than one batch."""
    least, rows = min(config.grid.data), manifest.splits["train"].rows
    if least * rows < config.train.batch_size:
        raise UsageError(
            f"grid.data: {least:g} of {rows} training images is less than one batch of "
            f"{config.train.batch_size}."
        )


def local_master(config: ScaleAtConfig) -> str | None:
    """Return a local master with a slot for every process, or else the configured master."""
    wanted, there = max(config.grid.processes), local_slots(submitted_master(config.spark.master))
    if config.spark.master or there is None or there >= wanted:
        return config.spark.master
    return f"local[{wanted}]"


def cells_of(
    config: ScaleAtConfig, threads: int, *, model: str | None = None, mode: str | None = None
) -> list[ScalePoint]:
    """Return the cells in running order.

    Cells to be compared run close together, with one process first.
    """
    cells = [
        ScalePoint(
            model=network,
            mode=way,
            data_share=share,
            scaling=scaling,
            world_size=world,
            threads_per_rank=threads,
            repeat=repeat,
        )
        for repeat in range(config.repeats)
        for network in ([model] if model else config.models)
        for way in ([mode] if mode else config.grid.mode)
        for share in sorted(config.grid.data, reverse=True)
        for scaling, world in _scales(config, share)
    ]
    return list(dict.fromkeys(cells))


def _scales(config: ScaleAtConfig, share: float) -> Iterator[tuple[Scaling, int]]:
    if config.grid.plain and share == max(config.grid.data):
        yield "plain", 1
        if max(config.grid.processes) > 1:
            yield "slice", 1
    for world in sorted(config.grid.processes):
        # With one process, strong and weak scaling are the same.
        for scaling in config.grid.scaling if world > 1 else config.grid.scaling[:1]:
            yield scaling, world


def timed_only(config: ScaleAtConfig, cell: ScalePoint) -> bool:
    """Return whether ``cell`` only measures the time of a few steps."""
    fewer = cell.world_size < max(config.grid.processes)
    return cell.scaling in ALONE or (config.test.at == "largest" and fewer)


def _batch_size(config: ScaleAtConfig, cell: ScalePoint) -> int:
    whole = config.train.batch_size
    if cell.scaling == "slice":
        return max(1, whole // max(config.grid.processes))
    return whole * (cell.world_size if cell.scaling == "weak" else 1)


def training_of(config: ScaleAtConfig, cell: ScalePoint) -> TrainAtConfig:
    """Return the configuration of jobs/train_at.py for ``cell``."""
    timed = timed_only(config, cell)
    weights = config.weights.get(cell.model, config.model.weights)
    batch = _batch_size(config, cell)
    changed: dict[str, Any] = {
        "mode": cell.mode.removesuffix(_DUAL),
        "dual_bn": cell.mode.endswith(_DUAL) or config.train.dual_bn,
        "awp": 0.0 if cell.mode == "standard" else config.train.awp,
        "batch_size": batch,
        # The speed is computed from these reports.
        "log_every": min(config.train.log_every, 5),
        "validation_images": 1 if timed else config.test.validation_images,
        "validation_steps": 1 if timed else min(config.train.validation_steps, config.test.steps),
        # The monitor could change a training midway; a sweep compares unchanged trainings.
        "monitor": config.train.monitor.model_copy(update={"action": "off"}),
    }
    if timed and config.shards is not None:
        rows = cell.data_share * read_manifest(config.shards).splits["train"].rows
        wanted = math.ceil((config.warmup_steps + config.timed_steps) / math.ceil(rows / batch))
        changed["epochs"] = min(config.train.epochs, wanted)
    return TrainAtConfig(
        shards=config.shards,
        model=config.model.model_copy(update={"name": cell.model, "weights": weights}),
        attack=config.attack,
        train=config.train.model_copy(update=changed),
        data=config.data.model_copy(update={"share": cell.data_share, "verify": "size"}),
        evaluate=AttackSettings(
            attacks=("fgsm",) if timed else config.test.attacks,
            norm=config.attack.norm,
            eps=(config.attack.eps,),
            steps=config.test.steps,
            images=1 if timed else config.test.images,
            sanity_images=0 if timed else PROBED_IMAGES,
        ),
        seed=config.seed + cell.repeat,
        launch=config.launch.model_copy(
            update={
                "processes": cell.world_size,
                "threads_per_process": cell.threads_per_rank,
                "ddp": cell.scaling not in ALONE,
            }
        ),
        spark=config.spark,
        track=config.track.model_copy(update={"run_name": str(cell), "system_metrics": False}),
    )
