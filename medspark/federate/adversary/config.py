"""The configuration of an attack on a federation: who is malicious, when, and with what settings.

This module does not import torch, so reading it is fast.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from medspark.config import Config
from medspark.errors import UsageError
from medspark.federate.adversary.a3fl import A3FL
from medspark.federate.adversary.adversary import Adversary, Backdoor
from medspark.federate.adversary.alie import Alie
from medspark.federate.adversary.badnets import BadNets
from medspark.federate.adversary.dba import DistributedBackdoor
from medspark.federate.adversary.edge_case import EdgeCase, Projected, Replacement
from medspark.federate.adversary.ipm import InnerProduct
from medspark.federate.adversary.label_flip import LabelFlip
from medspark.federate.adversary.neurotoxin import Neurotoxin
from medspark.federate.adversary.not_a_number import NotANumber
from medspark.federate.adversary.sign_flip import SignFlip
from medspark.shards.manifest import Manifest

__all__ = ["AdversaryConfig", "AdversaryName", "check_adversary"]

AdversaryName = Literal[
    "none", "edge_case", "projected", "replacement", "badnets", "dba", "neurotoxin", "a3fl",
    "label_flip", "sign_flip", "alie", "ipm", "nan",
]  # fmt: skip


class AdversaryConfig(Config):
    """The malicious clients. Each adversary has its own section of settings."""

    name: AdversaryName = Field("none", description="what the malicious clients do")
    share: float = Field(
        0.1, ge=0, le=1, description="share of the clients that are malicious, chosen by the seed"
    )
    clients: tuple[int, ...] = Field(
        (), description="numbers of the malicious clients, separated by commas; in place of share"
    )
    per_round: int | None = Field(
        None,
        ge=1,
        description="malicious clients in every attacked round (fixed frequency); by default as "
        "many as are selected by chance (fixed pool)",
    )
    from_round: int = Field(0, ge=0, description="first attacked round")
    until_round: int | None = Field(
        None, ge=0, description="round in which the attack has stopped; none: it never stops"
    )
    round_every: int = Field(1, ge=1, description="rounds between two attacked ones")
    edge: str | None = Field(
        None,
        description="tail images: a folder of shards or of image files, or 'phantom' for the "
        "portable style of the synthetic radiographs",
    )
    edge_label: int = Field(
        1, ge=0, description="true class of tail images that are files or of the phantom"
    )
    honest_edge: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of honest clients that hold tail images, rightly labelled",
    )
    honest_edge_images: int = Field(
        20, ge=1, description="most tail images that such a client holds"
    )
    edge_case: EdgeCase = EdgeCase()
    projected: Projected = Projected()
    replacement: Replacement = Replacement()
    badnets: BadNets = BadNets()
    dba: DistributedBackdoor = DistributedBackdoor()
    neurotoxin: Neurotoxin = Neurotoxin()
    a3fl: A3FL = A3FL()
    label_flip: LabelFlip = LabelFlip()
    sign_flip: SignFlip = SignFlip()
    alie: Alie = Alie()
    ipm: InnerProduct = InnerProduct()
    nan: NotANumber = NotANumber()

    @model_validator(mode="after")
    def _fits(self) -> AdversaryConfig:
        if self.edge is None and self.adversary.needs_edge:
            raise ValueError(f"{self.name} needs tail images: give edge, a folder or phantom")
        if self.edge is None and self.honest_edge > 0:
            raise ValueError("honest_edge needs tail images: give edge, a folder or phantom")
        if self.until_round is not None and self.until_round <= self.from_round:
            raise ValueError("until_round has to be later than from_round")
        return self

    @property
    def adversary(self) -> Adversary:
        """The adversary with its settings; one that changes nothing if the name is none."""
        return Adversary() if self.name == "none" else getattr(self, self.name)  # type: ignore[no-any-return]

    def attacks_in(self, round: int) -> bool:
        """Return whether the malicious clients attack in ``round``; else they are honest."""
        if self.name == "none" or round < self.from_round:
            return False
        if self.until_round is not None and round >= self.until_round:
            return False
        return (round - self.from_round) % self.round_every == 0


def check_adversary(
    config: AdversaryConfig, manifest: Manifest, *, clients: int, per_round: int
) -> None:
    """Raise UsageError if ``config`` does not fit a federation of so many clients on the shards."""
    classes = len(manifest.classes)
    if config.name != "none" and manifest.multi_label:
        raise UsageError(f"adversary.name {config.name} needs images of one class each.")
    unknown = [number for number in config.clients if not 0 <= number < clients]
    if unknown:
        raise UsageError(
            f"adversary.clients: there is no client {unknown[0]}, they are 0 to {clients - 1}."
        )
    adversary = config.adversary
    if isinstance(adversary, Backdoor) and adversary.target >= classes:
        raise UsageError(
            f"adversary.{config.name}.target: there is no class {adversary.target}, they are 0 to "
            f"{classes - 1}."
        )
    if config.edge is not None and config.edge_label >= classes:
        raise UsageError(
            f"adversary.edge_label: there is no class {config.edge_label}, they are 0 to "
            f"{classes - 1}."
        )
    if config.per_round is not None and config.per_round > per_round:
        raise UsageError(
            f"adversary.per_round {config.per_round} is more than the {per_round} clients of a "
            "round."
        )
