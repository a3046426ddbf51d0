"""Malicious clients: poisoned data and poisoned updates, by name."""

from __future__ import annotations

from medspark.federate.adversary.a3fl import A3FL
from medspark.federate.adversary.adversary import Adversary, Backdoor, Known
from medspark.federate.adversary.alie import Alie
from medspark.federate.adversary.badnets import BadNets
from medspark.federate.adversary.dba import DistributedBackdoor
from medspark.federate.adversary.edge_case import EdgeCase, Projected, Replacement
from medspark.federate.adversary.ipm import InnerProduct
from medspark.federate.adversary.label_flip import LabelFlip
from medspark.federate.adversary.neurotoxin import Neurotoxin
from medspark.federate.adversary.not_a_number import NotANumber
from medspark.federate.adversary.sign_flip import SignFlip

__all__ = ["ADVERSARIES", "Adversary", "Backdoor", "Known"]

ADVERSARIES: dict[str, type[Adversary]] = {
    "edge_case": EdgeCase,
    "projected": Projected,
    "replacement": Replacement,
    "badnets": BadNets,
    "dba": DistributedBackdoor,
    "neurotoxin": Neurotoxin,
    "a3fl": A3FL,
    "label_flip": LabelFlip,
    "sign_flip": SignFlip,
    "alie": Alie,
    "ipm": InnerProduct,
    "nan": NotANumber,
}
