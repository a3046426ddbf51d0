"""The configuration of the table of recipes, its checks, and the training of each recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError

from medspark import ownership
from medspark.attacks.config import AttackName
from medspark.attacks.threat import ThreatModel
from medspark.config import Config, first_problem
from medspark.data.config import DataConfig, check_data
from medspark.eps import Eps, eps_text
from medspark.errors import UsageError
from medspark.evaluate.config import AttackSettings, check_attacks
from medspark.files import sha256_of
from medspark.launch.distributor import check_room
from medspark.models.config import PRETRAINED, ModelConfig, check_model
from medspark.models.image_size import check_images
from medspark.remote import AnyPath, any_path
from medspark.shards.manifest import read_manifest, verify
from medspark.study.cells import digest
from medspark.study.recipe_report import DEFAULT
from medspark.train.combinations import check_combinations
from medspark.train.config import TrainConfig, check_ranks
from medspark.train.kinds import with_recipe
from medspark.workflows.evaluate_config import EvaluationSettings, positive_class
from medspark.workflows.job_settings import SparkTrainingConfig
from medspark.workflows.train_at import TrainAtConfig

__all__ = [
    "RecipeTableConfig", "RecipeTraining", "changes", "check_recipes", "fingerprint",
    "recipe_names", "training_of",
]  # fmt: skip

_BUDGETS = (1 / 255, 2 / 255, 4 / 255)


class Screening(EvaluationSettings):
    """The attacks on validation images, by which recipes are chosen."""

    split: Literal["val"] = Field("val", description="recipes are chosen on validation images")
    attacks: tuple[AttackName, ...] = Field(
        ("pgd_margin",), min_length=1, description="names of the attacks, separated by commas"
    )
    eps: tuple[Eps, ...] = Field(
        _BUDGETS, min_length=1, description="budgets, fractions of [0, 1]; attack.eps is among them"
    )
    gallery: int = Field(0, ge=0, description="patient images shown in the reports; 0 for none")


class FinalTest(EvaluationSettings):
    """The attacks on test images, once, of the default and the finalists."""

    split: Literal["test"] = Field("test", description="the default and the finalists are tested")
    attacks: tuple[AttackName, ...] = Field(
        ("pgd_margin", "autoattack"),
        min_length=1,
        description="names of the attacks, separated by commas",
    )
    eps: tuple[Eps, ...] = Field(
        _BUDGETS, min_length=1, description="budgets, fractions of [0, 1] as 2/255"
    )
    gallery: int = Field(0, ge=0, description="patient images shown in the reports; 0 for none")


class RecipeTableConfig(SparkTrainingConfig):
    """The table of recipes. ``folder`` keeps finished cells, which are not run again."""

    shards: dict[str, AnyPath] = Field(
        min_length=1, description="folders that jobs/shard.py wrote, by name: --shards.NAME FOLDER"
    )
    recipes: dict[str, Any] = Field(
        {},
        description="settings of train and data in which a recipe differs from the default, by "
        "name: --recipes.NAME.train.KEY VALUE; the default needs no entry",
    )
    seeds: tuple[int, ...] = Field(
        (0, 1, 2),
        min_length=1,
        description="seeds, separated by commas; recipes are screened with the first",
    )
    finalists: int = Field(2, ge=0, description="recipes to test beside the default")
    criterion: Literal["auroc", "balanced_accuracy"] = Field(
        "auroc", description="figure in the worst case at attack.eps by which recipes are chosen"
    )
    margin: float = Field(
        0.01, ge=0, le=1, description="most that clean AUROC may be below the default's on a set"
    )
    seconds: float | None = Field(
        None,
        gt=0,
        description="seconds of training for every recipe; by default, on each set, those that the "
        "default recipe needs for train.epochs, as timed",
    )
    calibration_steps: int = Field(
        40, ge=2, description="steps that time a recipe, before its number of steps is planned"
    )
    model: ModelConfig = ModelConfig()
    attack: ThreatModel = ThreatModel()
    train: TrainConfig = Field(TrainConfig(), description="the default recipe")
    data: DataConfig = DataConfig()
    screen: Screening = Screening()
    evaluate: FinalTest = FinalTest()
    folder: Path = Field(
        Path("build/recipe_table"),
        description="folder for networks, finished cells and the table, shared by all machines",
    )


class RecipeTraining(TrainAtConfig):
    """The training of one recipe, for a number of steps."""

    decides_weights: ClassVar = frozenset({"steps"})

    steps: int | None = Field(None, ge=1, description="steps, in place of train.epochs")


def recipe_names(config: RecipeTableConfig) -> tuple[str, ...]:
    """Return the names of all recipes, the default first."""
    named = dict.fromkeys(key.partition(".")[0] for key in config.recipes)
    return (DEFAULT, *(name for name in named if name != DEFAULT))


def changes(config: RecipeTableConfig, recipe: str) -> dict[str, Any]:
    """Return the changed settings of ``recipe`` by dotted keys.

    They come from YAML as mappings and from the command line with dotted keys, which win.
    """
    found = _flat(config.recipes.get(recipe) or {})
    dotted = f"{recipe}."
    for key, value in config.recipes.items():
        if key.startswith(dotted):
            found[key.removeprefix(dotted)] = value
    return found


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, Mapping):
        return {prefix.removesuffix("."): settings}
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.")
    return found


def training_of(
    config: RecipeTableConfig, recipe: str, *, seed: int, steps: int | None
) -> RecipeTraining:
    """Return the training of ``recipe``, without folders; ``steps`` None: for train.epochs.

    What neither ``train`` nor the recipe sets is chosen for the kind of network.
    Raises UsageError that names a setting which does not exist or cannot have its value.
    """
    sections: dict[str, Config] = {"train": config.train, "data": config.data}
    # Only what was chosen: a default can depend on the kind of network.
    documents = {n: section.model_dump(exclude_unset=True) for n, section in sections.items()}
    for key, value in changes(config, recipe).items():
        section, *path = key.split(".")
        if section not in sections or not path:
            given = f"recipes.{recipe}.{key}".removesuffix(".")
            raise UsageError(f"{given}: a recipe changes train.KEY or data.KEY.")
        if key == "train.epochs":
            raise UsageError(f"recipes.{recipe}.{key}: recipes get equal time, not epochs.")
        _set(documents[section], path, value)
    chosen: dict[str, Any] = {}
    for name, document in documents.items():
        try:
            chosen[name] = type(sections[name]).model_validate(document)
        except ValidationError as error:
            problem = first_problem(error, below=f"recipes.{recipe}.{name}")
            raise UsageError(f"{problem.rstrip('.')}.") from None
    training = RecipeTraining(
        model=config.model,
        attack=config.attack,
        **chosen,
        # The cells attack the network later. A training needs a test image, and one says nothing.
        evaluate=AttackSettings(attacks=(), eps=(), images=1, sanity_images=0),
        steps=steps,
        seed=seed,
        resume="auto",
        launch=config.launch,
        track=config.track,
    )
    return with_recipe(training)


def _set(document: dict[str, Any], path: list[str], value: Any) -> None:
    *groups, last = path
    for group in groups:
        inner = document.get(group)
        document[group] = document = dict(inner) if isinstance(inner, dict) else {}
    document[last] = value


def fingerprint(config: RecipeTableConfig, training: RecipeTraining, *, dataset: str) -> str:
    """Return a digest of all that decides a network and its training time; no paths.

    ``dataset`` is the digest of the shards. The number of processes and threads belongs to it,
    because a time that was measured with others says nothing.
    """
    decisive = training.deciding_weights()
    weights = config.model.weights
    contents = weights if weights in (None, PRETRAINED) else sha256_of(str(weights))
    decisive["model"] = [config.model.name, config.model.dropout, contents]
    if training.steps is not None:
        decisive["train"].pop("epochs")  # steps take their place
    launch = config.launch
    decisive["ranks"] = [launch.processes, launch.threads_per_process, launch.ddp]
    return digest(decisive | {"dataset": dataset})


def check_recipes(config: RecipeTableConfig) -> None:
    """Raise UsageError for every mistake that shows before Spark starts."""
    check_room(config.launch, config.spark.master)
    if not config.recipes:
        raise UsageError(
            "There are no recipes: give --recipes.NAME.train.KEY VALUE or "
            "--config conf/jobs/recipe_table.yaml."
        )
    if changes(config, DEFAULT):
        raise UsageError("recipes.default: the default recipe is train and data: change them.")
    if len(set(config.seeds)) < len(config.seeds):
        raise UsageError(f"seeds: {', '.join(map(str, config.seeds))} names one of them twice.")
    if config.attack.eps not in config.screen.eps:
        raise UsageError(
            f"screen.eps: attack.eps {eps_text(config.attack.eps)} has to be among the budgets, "
            "because recipes are chosen there."
        )
    for attacks in (config.screen.attacks, config.evaluate.attacks):
        check_attacks(attacks, gradients=True, surrogates=0)
    check_model(config.model)
    for folder in config.shards.values():
        _check_shards(folder, config)
    findings = any(read_manifest(folder).multi_label for folder in config.shards.values())
    for recipe in recipe_names(config):
        _check_recipe(config, recipe, multi_label=findings)
    sources = {f"shards.{name}": folder for name, folder in config.shards.items()}
    if config.model.weights not in (None, PRETRAINED):
        sources["model.weights"] = any_path(str(config.model.weights))
    ownership.apart(sources, {"the folder of the table": config.folder})
    ownership.check(config.folder, "study")


def _check_recipe(config: RecipeTableConfig, recipe: str, *, multi_label: bool) -> None:
    if recipe != DEFAULT and not changes(config, recipe):
        raise UsageError(f"recipes.{recipe}: give a setting that differs from the default.")
    training = training_of(config, recipe, seed=0, steps=None)
    try:
        check_ranks(training.train, config.launch.processes)
        check_data(training.data)
        check_combinations(training, multi_label=multi_label)
    except UsageError as error:
        raise error if recipe == DEFAULT else UsageError(f"recipes.{recipe}: {error}") from None


def _check_shards(folder: Path, config: RecipeTableConfig) -> None:
    manifest = read_manifest(folder)
    verify(folder, manifest, contents=False)
    check_images(config.model, manifest)
    for split in ("train", config.screen.split, config.evaluate.split):
        if split not in manifest.splits or manifest.splits[split].rows == 0:
            raise UsageError(f"The shards in {folder} have no {split} images.")
    for settings in (config.screen, config.evaluate):
        positive_class(settings.positive, manifest.classes)
