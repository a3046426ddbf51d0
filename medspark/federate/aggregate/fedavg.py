"""FedAvg: the mean of the updates, weighted by the clients' images (McMahan et al. 2017)."""

from __future__ import annotations

from typing import ClassVar

from medspark.federate.aggregate.rule import Rule

__all__ = ["FedAvg"]


class FedAvg(Rule):
    """The mean of the updates, weighted by the clients' images."""

    separable: ClassVar[bool] = True
