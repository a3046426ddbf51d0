"""Plan the paper's table: the configuration, the networks, and the recipe of each network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from medspark import ownership
from medspark.attacks.config import AttackName
from medspark.attacks.threat import ThreatModel
from medspark.config import Config
from medspark.data.config import DataConfig, check_data
from medspark.eps import Eps
from medspark.errors import UsageError
from medspark.evaluate.config import AttackSettings, check_attacks
from medspark.files import sha256_of
from medspark.launch.distributor import check_room
from medspark.models.config import PRETRAINED, ModelConfig, check_model
from medspark.models.image_size import check_images
from medspark.remote import AnyPath, any_path
from medspark.shards.manifest import Manifest, read_manifest, verify
from medspark.study.cells import digest
from medspark.study.paper_report import MetricName
from medspark.train.config import DistillConfig, TrainConfig, check_ranks
from medspark.train.kinds import with_recipe
from medspark.workflows.demo import DemoConfig, check_demo
from medspark.workflows.evaluate_config import EvaluationSettings, positive_class
from medspark.workflows.job_settings import SparkTrainingConfig
from medspark.workflows.train_at import TrainAtConfig

__all__ = [
    "Dataset", "Network", "PaperTableConfig", "Recipe", "check", "check_shards",
    "distillation", "fingerprint", "networks", "phantom_sets", "recipe", "surrogates",
]  # fmt: skip

TrainingName = Literal[
    "original", "adversarial", "pgd", "trades", "distillation", "robust_distillation"
]
ORIGINAL, TEACHER = "original", "teacher"
# Trainings that are modes of their own, whatever train.mode is.
_MODES = ("pgd", "trades")


class PhantomSets(Config):
    """Built-in synthetic data as datasets of the table."""

    counts: tuple[int, ...] = Field(
        (), description="numbers of images, one dataset for each number; separated by commas"
    )
    image_size: int = Field(64, ge=16, description="height and width, in pixels")
    seed: int = Field(0, description="seed of the synthetic archives")
    folder: Path = Field(Path("build/demo"), description="folder for archives, samples and shards")


class TableEvaluation(EvaluationSettings):
    """The attacks on every network of the table; fgsm is always one of them."""

    attacks: tuple[AttackName, ...] = Field(
        ("fgsm", "pgd", "pgd_margin"),
        description="attacks that the worst case is taken over, separated by commas; autoattack "
        "is the strongest and slowest; transfer, a separate column, uses images made on the other "
        "architectures' original networks of the same data and seed",
    )
    eps: tuple[Eps, ...] = Field(
        (2 / 255,),
        min_length=1,
        description="budgets, fractions of [0, 1] as 2/255, separated by commas",
    )
    steps: int = Field(10, ge=1, description="steps of PGD; APGD takes five times as many")


class PaperTableConfig(SparkTrainingConfig):
    """The paper's table. ``folder`` keeps finished cells, which are not run again."""

    datasets: dict[str, AnyPath] = Field(
        {}, description="folders that jobs/shard.py wrote, by name: --datasets.NAME FOLDER"
    )
    phantom: PhantomSets = PhantomSets()
    data_share: tuple[float, ...] = Field(
        (1.0,), description="shares of the training images, one row each; separated by commas"
    )
    models: tuple[str, ...] = Field(
        ("densenet121", "mobilenetv2_100", "resnet50"), min_length=1, description="timm model names"
    )
    weights: dict[str, str] = Field(
        {},
        description="initial weights by model, 'pretrained' or a .safetensors file, random by "
        "default: --weights.resnet50 FILE",
    )
    trainings: tuple[TrainingName, ...] = Field(
        ("original", "adversarial", "distillation"),
        min_length=1,
        description="ways of training, separated by commas; adversarial is train.mode; pgd and "
        "trades are these modes; distillation is defensive distillation (Papernot et al. 2016); "
        "robust_distillation learns from the adversarially trained network",
    )
    seeds: tuple[int, ...] = Field(
        (0,), min_length=1, description="random seeds, separated by commas"
    )
    attack: ThreatModel = ThreatModel()
    train: TrainConfig = Field(
        TrainConfig(), description="mode applies to adversarial training, the rest to all"
    )
    temperature: float = Field(50.0, gt=0, description="temperature of defensive distillation")
    robust_method: Literal["ard", "rslad"] = Field(
        "rslad", description="method of robust_distillation"
    )
    evaluate: TableEvaluation = TableEvaluation()
    columns: tuple[AttackName, ...] = Field(
        ("fgsm", "transfer"),
        description="attacks with a column of their own beside the worst case, separated by "
        "commas; those that are not among the attacks have none",
    )
    metric: MetricName = Field("accuracy", description="metric that table and picture show")
    data: DataConfig = DataConfig()
    folder: Path = Field(
        Path("build/paper_table"),
        description="folder for networks, finished cells and the table, shared by all machines",
    )


def check(config: PaperTableConfig) -> None:
    """Raise UsageError for every mistake that shows before Spark starts."""
    check_room(config.launch, config.spark.master)
    check_ranks(config.train, config.launch.processes)
    if not config.datasets and not config.phantom.counts:
        raise UsageError("There are no datasets: give --datasets.NAME FOLDER or --phantom.counts.")
    if any(count < 10 for count in config.phantom.counts):
        raise UsageError("phantom.counts: a synthetic archive has at least 10 images.")
    if not config.data_share or not all(0 < share <= 1 for share in config.data_share):
        raise UsageError("data_share: shares are above 0 and at most 1.")
    check_data(config.data.model_copy(update={"share": min(config.data_share)}))
    for name, values in _lists(config).items():
        if len(set(values)) < len(values):
            raise UsageError(f"{name}: {', '.join(map(str, values))} names one of them twice.")
    for name in config.weights:
        if name not in config.models:
            raise UsageError(
                f"weights.{name}: the models of this table are {', '.join(config.models)}."
            )
    for name in config.models:
        model = ModelConfig(name=name, weights=config.weights.get(name))
        check_model(model)
        for folder in config.datasets.values():
            check_images(model, read_manifest(folder))
    attacked = {"adversarial", "robust_distillation"} & set(config.trainings)
    if attacked and not config.train.attacks:
        raise UsageError(f"train.mode: {config.train.mode} is no adversarial training.")
    others = len(config.models) - 1 if ORIGINAL in config.trainings else 0
    check_attacks(config.evaluate.attacks, gradients=True, surrogates=others)
    for folder in config.datasets.values():
        check_shards(folder, config.evaluate)
    _check_folders(config)


def _check_folders(config: PaperTableConfig) -> None:
    files = {name: file for name, file in config.weights.items() if file != PRETRAINED}
    sources = {f"datasets.{name}": folder for name, folder in config.datasets.items()}
    sources |= {f"weights.{name}": any_path(file) for name, file in files.items()}
    ownership.apart(sources, {"the folder of the table": config.folder})
    ownership.check(config.folder, "study")
    for demo in phantom_sets(config):
        check_demo(demo)


def phantom_sets(config: PaperTableConfig) -> list[DemoConfig]:
    """Return the configurations of the table's built-in datasets."""
    phantom = config.phantom
    return [
        DemoConfig(folder=phantom.folder, count=n, image_size=phantom.image_size, seed=phantom.seed)
        for n in phantom.counts
    ]


def _lists(config: PaperTableConfig) -> dict[str, tuple[Any, ...]]:
    return {
        "models": config.models,
        "trainings": config.trainings,
        "seeds": config.seeds,
        "columns": config.columns,
        "data_share": config.data_share,
        "phantom.counts": config.phantom.counts,
    }


def check_shards(folder: Path, evaluate: EvaluationSettings) -> None:
    """Raise UsageError if the shards lack a split or a class that the table needs."""
    manifest = read_manifest(folder)
    verify(folder, manifest, contents=False)
    for split in ("train", evaluate.split):
        if split not in manifest.splits or manifest.splits[split].rows == 0:
            raise UsageError(f"The shards in {folder} have no {split} images.")
    positive_class(evaluate.positive, manifest.classes)


@dataclass(frozen=True)
class Dataset:
    """One dataset of the table, under its name there; ``share`` of it is trained on."""

    name: str
    folder: Path
    manifest: Manifest
    share: float = 1.0

    @property
    def train_images(self) -> int:
        """The number of training images; approximate for a share, which holds whole patients."""
        return round(self.share * self.manifest.splits["train"].rows)


@dataclass(frozen=True)
class Network:
    """One network of the table: its data, architecture, training, seed and teacher."""

    dataset: Dataset
    model: str
    training: str
    seed: int
    teacher: Network | None = None

    def __str__(self) -> str:
        return f"{self.model}, {self.training}, on {self.dataset.name}, seed {self.seed}"


# The training of the teacher, by the student's training. Both have the same architecture.
_TEACHERS = {"distillation": TEACHER, "robust_distillation": "adversarial"}


def networks(config: PaperTableConfig, datasets: Sequence[Dataset]) -> Iterator[Network]:
    """Yield the network of every cell, in the order of the table."""
    for dataset in datasets:
        for model in config.models:
            for training in config.trainings:
                for seed in config.seeds:
                    yield _network(dataset, model, training, seed)


def _network(dataset: Dataset, model: str, training: str, seed: int) -> Network:
    teacher = _TEACHERS.get(training)
    taught_by = None if teacher is None else _network(dataset, model, teacher, seed)
    return Network(dataset, model, training, seed, taught_by)


def surrogates(config: PaperTableConfig, network: Network) -> tuple[Network, ...]:
    """Return the networks on which the transfer attack makes the images it shows ``network``."""
    if "transfer" not in config.evaluate.attacks:
        return ()
    others = (model for model in config.models if model != network.model)
    return tuple(_network(network.dataset, model, ORIGINAL, network.seed) for model in others)


class Recipe(TrainAtConfig):
    """The training settings of one network of the table."""

    decides_weights: ClassVar = frozenset({"distill"})

    distill: DistillConfig | None = None


def recipe(config: PaperTableConfig, network: Network) -> Recipe:
    """Return the training settings of ``network``, without folders and without the teacher."""
    train = config.train
    if network.training in _MODES:
        train = train.model_copy(update={"mode": network.training})
    elif network.training != "adversarial":
        plain: dict[str, Any] = {"mode": "standard", "dual_bn": False, "gradalign": 0.0, "awp": 0.0}
        train = train.model_copy(update=plain)
    if network.training == TEACHER:
        # The teacher trains at the student's temperature (Papernot et al. 2016, section IV).
        train = train.model_copy(update={"temperature": config.temperature})
    chosen = Recipe(
        model=ModelConfig(name=network.model, weights=config.weights.get(network.model)),
        attack=config.attack,
        train=train,
        data=config.data.model_copy(update={"share": network.dataset.share}),
        evaluate=AttackSettings(attacks=(), eps=()),  # the cell attacks the network later
        seed=network.seed,
        resume="auto",
        launch=config.launch,
    )
    return with_recipe(chosen)


def distillation(config: PaperTableConfig, network: Network, teacher: Path) -> DistillConfig:
    """Return the distillation settings of ``network``, whose teacher is the folder ``teacher``."""
    if network.training == "distillation":
        heat = config.temperature
        return DistillConfig(teacher=teacher, method="defensive", temperature=heat)
    return DistillConfig(teacher=teacher, method=config.robust_method)


def fingerprint(config: PaperTableConfig, network: Network) -> str:
    """Return a digest of all that decides the network: data, recipe, seed, teacher; no paths."""
    chosen = recipe(config, network)
    decisive = chosen.deciding_weights()
    del decisive["distill"]  # the teacher's folder does not decide the network
    decisive["dataset"] = network.dataset.manifest.digest
    decisive["model"] = [network.model, _contents(chosen.model.weights)]
    if network.teacher is not None:
        decisive["distill"] = distillation(config, network, Path()).model_dump(mode="json")
        decisive["teacher"] = fingerprint(config, network.teacher)
    return digest(decisive)


def _contents(weights: str | None) -> str | None:
    if weights in (None, PRETRAINED):
        return weights
    return sha256_of(str(weights))
