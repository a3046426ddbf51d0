"""The configuration of a federation. This module does not import torch, so reading it is fast."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, ValidationError, model_validator

from medspark.config import Config, TrainingConfig
from medspark.data.config import AugmentConfig
from medspark.errors import UsageError
from medspark.federate.adversary.config import AdversaryConfig
from medspark.federate.aggregate import RULES, Rule
from medspark.federate.local import LocalConfig
from medspark.federate.partition import ClientsConfig
from medspark.federate.privacy import PrivacyConfig
from medspark.models.config import ModelConfig

__all__ = ["CohortConfig", "FederationConfig", "SlackConfig"]


class CohortConfig(ClientsConfig):
    """The clients, how many of them train in a round, and how many of these must answer."""

    per_round: int | None = Field(
        None, ge=1, description="clients that train in each round, drawn anew; default: all"
    )
    least: int = Field(1, ge=1, description="fewest usable answers with which a round counts")
    deadline: float = Field(
        600.0, gt=0, description="seconds that a client may train in a round, then it is left out"
    )

    def in_round(self, clients: int) -> int:
        """Return how many of ``clients`` clients train in a round.

        Raises UsageError if there are fewer than ``per_round``, or fewer train than ``least``.
        """
        per_round = clients if self.per_round is None else self.per_round
        if per_round > clients:
            raise UsageError(
                f"clients.per_round {per_round} is more than the {clients} clients: without it, "
                "all of them train in every round."
            )
        if self.least > per_round:
            raise UsageError(
                f"clients.least {self.least} is more than the {per_round} clients of a round."
            )
        return per_round


class SlackConfig(Config):
    """SFAT: clients with a small adversarial loss count more (Zhu et al. 2023)."""

    slack: float = Field(
        0.0, ge=0, lt=1, description="favoured clients count (1 + slack)/(1 - slack) times; 0: off"
    )
    enhanced: int = Field(1, ge=1, description="number of favoured clients in a round")


class FederationConfig(LocalConfig, TrainingConfig):
    """A federation: the clients, their local training, and the aggregation of their updates."""

    decides_weights: ClassVar = frozenset(LocalConfig.model_fields) | {
        "clients", "rounds", "aggregate", "rule", "sfat", "adversary", "privacy", "root_images",
        "model", "augment", "seed",
    }  # fmt: skip

    clients: CohortConfig = CohortConfig()
    rounds: int = Field(10, ge=1, description="number of rounds")
    aggregate: str = Field("fedavg", description=f"aggregation rule: {', '.join(RULES)}")
    rule: dict[str, Any] = Field(
        default_factory=dict, description="settings of the rule, as --rule.bound 2"
    )
    sfat: SlackConfig = SlackConfig()
    adversary: AdversaryConfig = AdversaryConfig()
    privacy: PrivacyConfig | None = Field(
        None, description="user-level differential privacy, instead of aggregate; default: none"
    )
    root_images: int = Field(
        100, ge=1, description="validation images that the server trains on, for fltrust"
    )
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    seed: int = Field(0, ge=0, description="of the weights, the cohorts, the batches, all noise")

    @model_validator(mode="before")
    @classmethod
    def _norms_fit_the_first_weights(cls, given: Any) -> Any:
        """Average the statistics of batch norm if the weights are random and no policy is given."""
        if not isinstance(given, dict) or "batch_norm" in given:
            return given
        model = ModelConfig.model_validate(given.get("model", {}))
        return given | {"batch_norm": "average" if model.weights is None else "frozen"}

    @model_validator(mode="after")
    def _has_a_rule(self) -> FederationConfig:
        if self.aggregate not in RULES:
            raise ValueError(f"aggregate: there is no rule '{self.aggregate}'; see --help")
        try:
            RULES[self.aggregate].model_validate(self.rule)
        except ValidationError as error:
            wrong = error.errors()[0]
            name = ".".join(str(part) for part in wrong["loc"])
            raise ValueError(f"rule.{name} of {self.aggregate}: {wrong['msg'].lower()}") from None
        if self.privacy is not None and (self.rule or self.aggregate != "fedavg"):
            raise ValueError("privacy has its own aggregation rule: leave aggregate and rule out")
        if self.privacy is not None and self.sfat.slack:
            raise ValueError("privacy and sfat exclude each other")
        return self

    def deciding_weights(self) -> dict[str, Any]:
        """Return the settings that decide the weights.

        Float32 is not named: federations of before this could be chosen go on.
        """
        chosen = super().deciding_weights()
        if self.precision == "fp32":
            del chosen["precision"]
        return chosen

    def rule_for(self, clients: int) -> Rule:
        """Return the aggregation rule of a federation of ``clients`` clients."""
        if self.privacy is not None:
            return self.privacy.rule(clients)
        return RULES[self.aggregate].model_validate(self.rule)

    @property
    def adds_up(self) -> bool:
        """Whether tasks can add up the updates of their clients, without storing each."""
        needs_each = self.sfat.slack > 0 or self.adversary.adversary.needs_honest
        return self.rule_for(1).separable and not needs_each

    @property
    def keeps_memory(self) -> bool:
        """Whether clients keep anything private between rounds."""
        return self.scaffold or self.batch_norm == "local"

    @property
    def keeps_change(self) -> bool:
        """Whether the next round needs the change of the weights in this one."""
        centre = "centre" in self.rule_for(1).references
        return centre or self.adversary.adversary.needs_last_change
