"""Figures of an attack on a federation: success of the backdoor, how it lasts, who was detected."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from medspark.config import Config
from medspark.federate.adversary.adversary import Known
from medspark.federate.adversary.badnets import BadNets
from medspark.federate.adversary.config import AdversaryConfig
from medspark.federate.adversary.edge_case import EdgeCase
from medspark.federate.edge import EdgeImages
from medspark.models.classifier import evaluating

__all__ = ["Detection", "Probe", "RoundOfAttack", "detection", "lasting", "probe"]

_BATCH = 256


class RoundOfAttack(Config):
    """The attack's part of a round's record."""

    malicious: tuple[int, ...] = Field((), description="clients that attacked in this round")
    rejected: tuple[int, ...] | None = Field(
        None, description="clients that the rule rejected; none if the rule detects nobody"
    )
    success: float | None = Field(
        None, description="share of the probe's images that get the attacker's class"
    )


class Detection(Config):
    """What a detecting rule rejected over all rounds; a rate is none where nobody could be."""

    tpr: float | None = Field(None, description="share of the malicious updates that were rejected")
    fpr: float | None = Field(None, description="share of the honest updates that were rejected")


@dataclass(frozen=True)
class Probe:
    """Images (N, C, H, W) on which a backdoor succeeds if they are assigned to ``target``."""

    images: Tensor
    target: int

    @torch.no_grad()
    def success(self, model: nn.Module) -> float:
        """Return the share of the images that ``model`` assigns to the target."""
        with evaluating(model):
            parts = torch.split(self.images, _BATCH)
            hits = sum(int((model(part).argmax(1) == self.target).sum()) for part in parts)
        return hits / len(self.images)


def probe(
    config: AdversaryConfig,
    images: Tensor,
    labels: Tensor,
    *,
    edge: EdgeImages | None = None,
    pattern: Tensor | None = None,
) -> Probe | None:
    """Return what the success of the attack is measured on; None for attacks without a target.

    That is the tail's test images ``edge`` that are not of the target class, or the test ``images``
    (N, C, H, W) of other classes with the whole trigger on them, ``pattern`` if one was prepared.
    Without an adversary, tail images show how many get the edge-case adversary's class anyway.
    """
    adversary = config.edge_case if config.name == "none" else config.adversary
    if isinstance(adversary, BadNets):
        stamped = adversary.triggered(images, labels, Known(pattern=pattern))
        return Probe(stamped, adversary.target) if len(stamped) else None
    if isinstance(adversary, EdgeCase) and edge is not None:
        others = edge.images[edge.labels != adversary.target]
        return Probe(others, adversary.target) if len(others) else None
    return None


def detection(rounds: Iterable[tuple[RoundOfAttack, Iterable[int]]]) -> Detection:
    """Return how well malicious updates were rejected; each round comes with whom it counted.

    Rounds whose rule detects nobody do not count, nor do clients that were left out.
    """
    rejected = {True: 0, False: 0}
    counted = {True: 0, False: 0}
    for attack, clients in rounds:
        for client in clients if attack.rejected is not None else ():
            lies = client in attack.malicious
            counted[lies] += 1
            rejected[lies] += client in (attack.rejected or ())
    rates = {lies: rejected[lies] / n if n else None for lies, n in counted.items()}
    return Detection(tpr=rates[True], fpr=rates[False])


def lasting(
    successes: Mapping[int, float | None], stopped: int, rounds: int, *, over: int = 1
) -> float | None:
    """Return the success ``rounds`` rounds after the attack stopped, None if not measured.

    ``successes`` are measured after each round; ``stopped`` is the first round without the attack,
    so after 0 rounds it is the success at the attack's end. It is the mean ``over`` the last rounds
    until then: from round to round, success jumps with the clients that take part.
    """
    last = stopped - 1 + rounds
    found = [successes.get(round) for round in range(max(0, last - over + 1), last + 1)]
    known = [value for value in found if value is not None]
    return statistics.fmean(known) if known and successes.get(last) is not None else None
