"""What the paper's table is made of: which networks there are, and the recipe of each."""

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
from medspark.shards.manifest import Manifest, read_manifest, verify
from medspark.study.cells import digest
from medspark.study.paper_report import MetricName
from medspark.train.config import DistillConfig, TrainConfig, check_ranks
from medspark.workflows.demo import DemoConfig, check_demo
from medspark.workflows.evaluate_config import EvaluationSettings, positive_class
from medspark.workflows.job_settings import SparkTrainingConfig
from medspark.workflows.train_at import TrainAtConfig

__all__ = [
    "Dataset", "Network", "PaperTableConfig", "Recipe", "check", "check_shards",
    "distillation", "fingerprint", "networks", "phantom_sets", "recipe", "surrogates",
]  # fmt: skip

TrainingName = Literal["original", "adversarial", "distillation", "robust_distillation"]
ORIGINAL, TEACHER = "original", "teacher"


class PhantomSets(Config):
    """Built-in synthetic data as datasets of the table."""

    counts: tuple[int, ...] = Field(
        (), description="images of each, one dataset for every number; separated by commas"
    )
    image_size: int = Field(64, ge=16, description="height and width, in pixels")
    seed: int = Field(0, description="of the synthetic archives")
    folder: Path = Field(Path("build/demo"), description="where archives, samples and shards go")


class TableEvaluation(EvaluationSettings):
    """What every network of the table is attacked with; fgsm is always among the attacks."""

    attacks: tuple[AttackName, ...] = Field(
        ("fgsm", "pgd", "pgd_margin"),
        description="what the worst case is taken over, separated by commas; autoattack is the "
        "strongest and the slowest; transfer, a column of its own, makes images for the other "
        "networks' originals of the same data and seed",
    )
    eps: tuple[Eps, ...] = Field(
        (2 / 255,),
        min_length=1,
        description="budgets, fractions of [0, 1] as 2/255, separated by commas",
    )
    steps: int = Field(10, ge=1, description="steps of PGD; APGD takes five times as many")


class PaperTableConfig(SparkTrainingConfig):
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
    evaluate: TableEvaluation = TableEvaluation()
    metric: MetricName = Field("accuracy", description="figure that table and picture show")
    data: DataConfig = DataConfig()
    folder: Path = Field(
        Path("build/paper_table"),
        description="for networks, finished cells and the table; all machines see it",
    )


def check(config: PaperTableConfig) -> None:
    """Raise UsageError for what can be found wrong before Spark starts."""
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
        check_model(ModelConfig(name=name, weights=config.weights.get(name)))
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
    sources |= {f"weights.{name}": Path(file) for name, file in files.items()}
    ownership.apart(sources, {"the folder of the table": config.folder})
    ownership.check(config.folder, "study")
    for demo in phantom_sets(config):
        check_demo(demo)


def phantom_sets(config: PaperTableConfig) -> list[DemoConfig]:
    """Return the built-in data of the table."""
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
        "data_share": config.data_share,
        "phantom.counts": config.phantom.counts,
    }


def check_shards(folder: Path, evaluate: EvaluationSettings) -> None:
    """Raise UsageError for shards that cannot be trained on and attacked so."""
    manifest = read_manifest(folder)
    verify(folder, manifest, contents=False)
    for split in ("train", evaluate.split):
        if split not in manifest.splits or manifest.splits[split].rows == 0:
            raise UsageError(f"The shards in {folder} have no {split} images.")
    positive_class(evaluate.positive, manifest.classes)


@dataclass(frozen=True)
class Dataset:
    """One dataset of the table, by the name that the table calls it; ``share`` is trained on."""

    name: str
    folder: Path
    manifest: Manifest
    share: float = 1.0

    @property
    def train_images(self) -> int:
        """The number of images to train on; of a share, which consists of whole patients, about."""
        return round(self.share * self.manifest.splits["train"].rows)


@dataclass(frozen=True)
class Network:
    """One network to be trained: on what, how, from which seed, and taught by whom."""

    dataset: Dataset
    model: str
    training: str
    seed: int
    teacher: Network | None = None

    def __str__(self) -> str:
        return f"{self.model}, {self.training}, on {self.dataset.name}, seed {self.seed}"


# Who teaches the networks that learn from another one of the same architecture.
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
    """Return the networks that transfer makes images for, to show them to ``network``."""
    if "transfer" not in config.evaluate.attacks:
        return ()
    others = (model for model in config.models if model != network.model)
    return tuple(_network(network.dataset, model, ORIGINAL, network.seed) for model in others)


class Recipe(TrainAtConfig):
    """How one network of the table is trained."""

    decides_weights: ClassVar = frozenset({"distill"})

    distill: DistillConfig | None = None


def recipe(config: PaperTableConfig, network: Network) -> Recipe:
    """Return how ``network`` is trained, but for folders and for the teacher."""
    train = config.train
    if network.training != "adversarial":
        plain: dict[str, Any] = {"mode": "standard", "dual_bn": False, "gradalign": 0.0}
        train = train.model_copy(update=plain)
    if network.training == TEACHER:
        # It learns at the temperature that it teaches at (Papernot et al. 2016, section IV).
        train = train.model_copy(update={"temperature": config.temperature})
    return Recipe(
        model=ModelConfig(name=network.model, weights=config.weights.get(network.model)),
        attack=config.attack,
        train=train,
        data=config.data.model_copy(update={"share": network.dataset.share}),
        evaluate=AttackSettings(attacks=(), eps=()),  # what is attacked is the cell, later
        seed=network.seed,
        resume="auto",
        launch=config.launch,
    )


def distillation(config: PaperTableConfig, network: Network, teacher: Path) -> DistillConfig:
    """Return what ``network`` learns from the model in the folder ``teacher``, and how."""
    if network.training == "distillation":
        heat = config.temperature
        return DistillConfig(teacher=teacher, method="defensive", temperature=heat)
    return DistillConfig(teacher=teacher, method=config.robust_method)


def fingerprint(config: PaperTableConfig, network: Network) -> str:
    """Return what tells this network from others: data, recipe, seed, teacher; no paths."""
    chosen = recipe(config, network)
    told = chosen.deciding_weights()
    del told["distill"]  # names the teacher's folder, which is no property of the network
    told["dataset"] = network.dataset.manifest.digest
    told["model"] = [network.model, _contents(chosen.model.weights)]
    if network.teacher is not None:
        told["distill"] = distillation(config, network, Path()).model_dump(mode="json")
        told["teacher"] = fingerprint(config, network.teacher)
    return digest(told)


def _contents(weights: str | None) -> str | None:
    if weights in (None, PRETRAINED):
        return weights
    return sha256_of(str(weights))
