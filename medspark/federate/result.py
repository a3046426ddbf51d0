"""The typed result document of a federation."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from medspark.evaluate.result import AttackFigures, ConditionFigures, RobustnessResult
from medspark.federate.server import RoundRecord
from medspark.job import Result

__all__ = ["ClientFigures", "FederationResult", "RoundFigures"]


class RoundFigures(RoundRecord, Result):
    """A round, with the network's metrics on validation images if the round was validated."""

    clean: ConditionFigures | None = None
    attacks: tuple[AttackFigures, ...] = ()
    backdoor: float | None = Field(
        None,
        description="backdoor success: share of the tail or triggered images of other "
        "classes that get the attacker's class",
    )


class ClientFigures(Result):
    """The network's metrics on the test images that one client would hold.

    By patient, test patients are at no client. They are divided as the training patients are, and
    ``client`` is the number of such a group.
    """

    client: int
    site: str | None = Field(None, description="with clients.by site")
    images: int
    own_network: bool = Field(
        False, description="whether the network has the client's own batch norms (FedBN)"
    )
    clean: ConditionFigures
    worst_case: tuple[AttackFigures, ...] = ()


class FederationResult(RobustnessResult):
    """The result document of a federation: robustness on the test images, and its rounds."""

    mode: str = Field(description="train.mode of the clients")
    aggregate: str = Field(description="aggregation rule")
    rounds: tuple[RoundFigures, ...] = ()
    per_client: tuple[ClientFigures, ...] = ()
    clients: int = Field(description="clients that hold training images")
    clients_by: str = Field("", description="clients.by; empty in results of earlier versions")
    model: str = Field(description="folder of the network after the last round")
    architecture: str
    batch_norm: str
    steps: int = Field(description="steps of all counted clients, summed")
    epsilon: float | None = Field(None, description="of user-level differential privacy")
    train_images: int
    dataset_digest: str
    seconds: float = Field(description="duration of all rounds, without validations")
    tasks: int = Field(description="Spark tasks that trained at once")
    report: str = Field("", description="path of the report")
    mlflow: dict[str, Any] = Field({}, description="where to find the run")
