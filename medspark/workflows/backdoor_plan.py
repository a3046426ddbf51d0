"""Plan the backdoor table: its configuration, its federations, and what decides each of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from medspark import ownership
from medspark.config import Config, first_problem
from medspark.data.config import AugmentConfig
from medspark.errors import UsageError
from medspark.evaluate.config import AttackSettings, check_attacks
from medspark.federate.adversary.config import AdversaryConfig, AdversaryName, check_adversary
from medspark.federate.aggregate import RULES
from medspark.federate.config import CohortConfig, FederationConfig
from medspark.federate.local import LocalConfig
from medspark.federate.partition import clients_of
from medspark.files import sha256_of
from medspark.job import JobConfig
from medspark.models.config import PRETRAINED, ModelConfig, check_model
from medspark.remote import AnyPath
from medspark.shards.manifest import Manifest, read_manifest, verify
from medspark.spark.session import SparkConfig
from medspark.study.backdoor_report import NOBODY
from medspark.study.cells import digest
from medspark.track.config import TrackConfig
from medspark.workflows.demo import DemoConfig, check_demo

__all__ = [
    "BackdoorTableConfig", "Federation", "ablation", "check", "check_shards", "federation_of",
    "fingerprint", "screened", "table", "usable", "warm_up", "warm_up_name",
]  # fmt: skip

# The keys of the attack that the table sets itself, cell by cell.
_OURS = ("name", "from_round", "until_round", "honest_edge")


class AblationConfig(Config):
    """Success against the share of honest clients that hold tail images with their true class."""

    shares: tuple[float, ...] = Field(
        (), description="shares of the honest clients, separated by commas; none: no ablation"
    )
    adversaries: tuple[AdversaryName, ...] = Field(
        ("edge_case", "projected"), description="adversaries, separated by commas"
    )
    rules: tuple[str, ...] = Field(
        ("fedavg", "norm_clipping"), description="aggregation rules, separated by commas"
    )


class BackdoorTableConfig(JobConfig):
    """The backdoor table. ``folder`` keeps finished cells, which are not run again."""

    shards: AnyPath | None = Field(
        None, description="folder that jobs/shard.py wrote; built-in demo data by default"
    )
    demo: DemoConfig = DemoConfig()
    adversaries: tuple[AdversaryName, ...] = Field(
        ("none", "edge_case", "projected", "replacement", "badnets", "dba", "neurotoxin", "a3fl",
         "label_flip", "sign_flip", "alie", "ipm", "nan"),
        min_length=1, description="adversaries, separated by commas",
    )  # fmt: skip
    rules: tuple[str, ...] = Field(
        ("fedavg", "median", "trimmed_mean", "krum", "multi_krum", "bulyan", "rfa",
         "centered_clipping", "norm_clipping", "weak_dp", "rlr", "flame", "fltrust", "foolsgold"),
        min_length=1, description="aggregation rules, separated by commas",
    )  # fmt: skip
    rule: dict[str, Any] = Field(
        {}, description="settings of rules by name, as --rule.norm_clipping.bound 2"
    )
    seeds: tuple[int, ...] = Field(
        (0,), min_length=1, description="random seeds, separated by commas"
    )
    margin: float = Field(
        0.1,
        ge=0,
        le=1,
        description="seeds after the first are run for rows whose main accuracy or success is this "
        "far from that of the same rule without an attack; 0: for all rows",
    )
    ablation: AblationConfig = AblationConfig()
    warm_up: int = Field(
        10, ge=0, description="passes over all training images before the first round, not divided"
    )
    rounds: int = Field(10, ge=1, description="attacked rounds")
    later: int = Field(10, ge=0, description="rounds after the attack has stopped")
    averaged: int = Field(3, ge=1, description="last rounds that a success is the mean of")
    adversary: AdversaryConfig = AdversaryConfig()
    clients: CohortConfig = CohortConfig()
    local: LocalConfig = LocalConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    root_images: int = Field(
        100, ge=1, description="validation images that the server trains on, for fltrust"
    )
    evaluate: AttackSettings = AttackSettings()
    folder: Path = Field(
        Path("build/backdoor_table"), description="folder for finished cells and the table"
    )
    spark: SparkConfig = SparkConfig()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _fits(self) -> BackdoorTableConfig:
        usual = AdversaryConfig()
        for key in _OURS:
            if getattr(self.adversary, key) != getattr(usual, key):
                raise ValueError(f"adversary.{key} is set by the table, cell by cell: leave it out")
        if self.local.batch_norm not in ("frozen", "average"):
            raise ValueError("local.batch_norm: the table needs one network for all clients")
        return self

    def settings_of(self, rule: str) -> dict[str, Any]:
        """Return the settings of a rule: from YAML as a mapping, from dotted keys one by one."""
        found = dict(self.rule.get(rule, {}))
        dotted = f"{rule}."
        return found | {
            key.removeprefix(dotted): value
            for key, value in self.rule.items()
            if key.startswith(dotted)
        }


@dataclass(frozen=True)
class Federation:
    """One federation of the table: what varies from cell to cell."""

    adversary: AdversaryName
    rule: str
    seed: int
    honest_edge: float = 0.0

    def __str__(self) -> str:
        held = f", {100 * self.honest_edge:g} % with tail images" if self.honest_edge else ""
        return f"{self.adversary}, {self.rule}, seed {self.seed}{held}"


def table(config: BackdoorTableConfig, seed: int) -> Iterator[Federation]:
    """Yield the federations of the table for one seed, those without an attack first.

    An adversary whose updates reach no rule has one cell, with the first rule.
    """
    calm_first = sorted(config.adversaries, key=lambda name: name != NOBODY)
    for adversary in calm_first:
        attack = config.adversary.model_copy(update={"name": adversary}).adversary
        for rule in config.rules if attack.reaches_rules else config.rules[:1]:
            yield Federation(adversary, rule, seed)


def ablation(config: BackdoorTableConfig) -> Iterator[Federation]:
    """Yield the federations of the ablation."""
    chosen = config.ablation
    for adversary in chosen.adversaries:
        for rule in chosen.rules:
            for share in chosen.shares:
                for seed in config.seeds:
                    yield Federation(adversary, rule, seed, share)


def screened(
    first: Iterable[Federation], seeds: Iterable[int], differing: Iterable[Federation]
) -> list[Federation]:
    """Return all federations: of the ``differing`` ones each seed, of the others the first."""
    again = set(differing)
    return [
        chosen
        for one in first
        for chosen in [one, *(replace(one, seed=seed) for seed in seeds if one in again)]
    ]


def warm_up(config: BackdoorTableConfig, seed: int) -> FederationConfig:
    """Return the training that all cells of a seed start from: one client that holds all images.

    That is central training (law 9 of the federation), one pass a round.
    """
    alone = {"by": "patient", "count": 1, "per_round": None}
    clients = config.clients.model_dump() | alone
    local = config.local.model_dump() | {"epochs": 1}
    chosen = _federation(config, local, clients, seed) | {"rounds": max(1, config.warm_up)}
    return FederationConfig.model_validate(chosen)


def federation_of(config: BackdoorTableConfig, one: Federation) -> FederationConfig:
    """Return the configuration of the rounds of ``one``, which follow the warm-up."""
    attack = {"name": one.adversary, "until_round": config.rounds, "honest_edge": one.honest_edge}
    chosen = _federation(config, config.local.model_dump(), config.clients.model_dump(), one.seed)
    return FederationConfig.model_validate(
        chosen
        | {
            "rounds": config.rounds + config.later,
            "aggregate": one.rule,
            "rule": config.settings_of(one.rule),
            "adversary": config.adversary.model_dump() | attack,
        }
    )


def _federation(
    config: BackdoorTableConfig, local: dict[str, Any], clients: dict[str, Any], seed: int
) -> dict[str, Any]:
    shared = {
        "clients": clients,
        "root_images": config.root_images,
        "model": config.model.model_dump(),
        "augment": config.augment.model_dump(),
        "seed": seed,
    }
    return local | shared


def fingerprint(config: BackdoorTableConfig, one: Federation, manifest: Manifest) -> str:
    """Return a digest of all that decides the figures of a cell; no paths.

    Settings of other adversaries and rules do not belong to it.
    """
    return digest(
        {
            "federation": _deciding(federation_of(config, one)),
            "warm_up": warm_up_name(config, one.seed, manifest),
            "rounds": [config.rounds, config.later, config.averaged],
            "evaluate": config.evaluate.model_dump(mode="json"),
            "edge": _contents_of(config.adversary.edge),
        }
    )


def warm_up_name(config: BackdoorTableConfig, seed: int, manifest: Manifest) -> str:
    """Return a digest of all that decides the weights that the cells of a seed start from."""
    chosen = _deciding(warm_up(config, seed)) | {"rounds": config.warm_up}
    weights = config.model.weights
    if weights not in (None, PRETRAINED):
        chosen["weights"] = sha256_of(str(weights))
    return digest(chosen | {"dataset": manifest.digest})


def _deciding(config: FederationConfig) -> dict[str, Any]:
    found = config.deciding_weights()
    attack: dict[str, Any] = config.adversary.model_dump(mode="json")
    sections = set(AdversaryName.__args__) - {config.adversary.name}  # type: ignore[attr-defined]
    found["adversary"] = {key: attack[key] for key in attack if key not in sections | {"edge"}}
    found["model"] = config.model.name, config.model.dropout
    return found


def _contents_of(edge: str | None) -> Any:
    """Return what tells the tail images apart: their files, not where they lie."""
    if edge is None or not Path(edge).is_dir():
        return edge
    files = sorted(path for path in Path(edge).rglob("*") if path.is_file())
    return [sha256_of(path) for path in files]


def check(config: BackdoorTableConfig) -> None:
    """Raise UsageError for every mistake that shows before Spark starts."""
    lists: dict[str, tuple[Any, ...]] = {
        "adversaries": config.adversaries,
        "rules": config.rules,
        "seeds": config.seeds,
        "ablation.shares": config.ablation.shares,
        "ablation.adversaries": config.ablation.adversaries,
        "ablation.rules": config.ablation.rules,
    }
    for name, values in lists.items():
        if len(set(values)) < len(values):
            raise UsageError(f"{name}: {', '.join(map(str, values))} names one of them twice.")
    if not all(0 <= share <= 1 for share in config.ablation.shares):
        raise UsageError("ablation.shares: shares are from 0 to 1.")
    for rule in config.rule:
        if rule.partition(".")[0] not in RULES:
            raise UsageError(f"rule.{rule}: there is no such rule; there are {', '.join(RULES)}.")
    for one in _every(config):
        _check_federation(config, one)
    check_model(config.model)
    check_attacks(config.evaluate.attacks, gradients=True, surrogates=0)
    sources = {"shards": config.shards}
    edge = config.adversary.edge
    if edge is not None and Path(edge).is_dir():
        sources["adversary.edge"] = Path(edge)
    ownership.apart(sources, {"the folder of the table": config.folder})
    ownership.check(config.folder, "study")
    if config.shards is None:
        check_demo(config.demo)
    else:
        check_shards(config, config.shards)


def _every(config: BackdoorTableConfig) -> Iterator[Federation]:
    yield from table(config, config.seeds[0])
    yield from ablation(config)


def _check_federation(config: BackdoorTableConfig, one: Federation) -> None:
    if one.rule not in RULES:
        raise UsageError(f"rules: there is no rule {one.rule}; there are {', '.join(RULES)}.")
    try:
        RULES[one.rule].model_validate(config.settings_of(one.rule))
    except ValidationError as error:
        raise UsageError(f"{first_problem(error, below=f'rule.{one.rule}')}.") from None
    try:
        federation_of(config, one)
    except ValidationError as error:
        raise UsageError(f"{one}: {first_problem(error)}.") from None


def check_shards(config: BackdoorTableConfig, folder: Path) -> None:
    """Raise UsageError if the shards do not fit the table."""
    manifest = read_manifest(folder)
    verify(folder, manifest, contents=False)
    for split in ("train", "test"):
        if not _images(manifest, split):
            raise UsageError(f"The shards in {folder} have no {split} images.")
    clients = clients_of(config.clients, manifest.splits["train"])
    per_round = config.clients.in_round(clients)
    for one in _every(config):
        adversary = federation_of(config, one).adversary
        check_adversary(adversary, manifest, clients=clients, per_round=per_round)
    usable(config, manifest)


def usable(
    config: BackdoorTableConfig, manifest: Manifest
) -> tuple[BackdoorTableConfig, dict[str, str]]:
    """Return the table without the rules that cannot work on these shards, and why not, by rule.

    Raises UsageError if no rule is left.
    """
    clients = clients_of(config.clients, manifest.splits["train"])
    reasons: dict[str, str] = {}
    for name in dict.fromkeys([*config.rules, *config.ablation.rules]):
        rule = RULES[name].model_validate(config.settings_of(name))
        try:
            rule.check_round(config.clients.in_round(clients))
        except UsageError as error:
            reasons[name] = str(error)
        if "root" in rule.references and not _images(manifest, "val"):
            reasons[name] = f"{name} trains on validation images, and these shards have none."
    rules = tuple(name for name in config.rules if name not in reasons)
    if not rules:
        raise UsageError(reasons[config.rules[0]])
    shared = tuple(name for name in config.ablation.rules if name not in reasons)
    ablation = config.ablation.model_copy(update={"rules": shared})
    return config.model_copy(update={"rules": rules, "ablation": ablation}), reasons


def _images(manifest: Manifest, split: str) -> int:
    return manifest.splits[split].rows if split in manifest.splits else 0
