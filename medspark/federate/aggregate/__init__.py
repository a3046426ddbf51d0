"""Aggregation: combine the updates of a round into one change of the weights (``RULES``)."""

from __future__ import annotations

from medspark.federate.aggregate.bulyan import Bulyan
from medspark.federate.aggregate.centered_clipping import CenteredClipping
from medspark.federate.aggregate.dp_fedavg import DPFedAvg
from medspark.federate.aggregate.exact import fault
from medspark.federate.aggregate.fedadam import FedAdam
from medspark.federate.aggregate.fedavg import FedAvg
from medspark.federate.aggregate.fedavgm import FedAvgM
from medspark.federate.aggregate.fedyogi import FedYogi
from medspark.federate.aggregate.flame import Flame
from medspark.federate.aggregate.fltrust import FLTrust
from medspark.federate.aggregate.foolsgold import FoolsGold
from medspark.federate.aggregate.in_memory import Aggregate, aggregate
from medspark.federate.aggregate.krum import Krum, MultiKrum
from medspark.federate.aggregate.median import Median
from medspark.federate.aggregate.norm_clipping import NormClipping
from medspark.federate.aggregate.rfa import GeometricMedian
from medspark.federate.aggregate.rlr import RobustLearningRate
from medspark.federate.aggregate.rule import Rule
from medspark.federate.aggregate.trimmed_mean import TrimmedMean
from medspark.federate.aggregate.weak_dp import WeakDP

__all__ = ["RULES", "Aggregate", "Rule", "aggregate", "fault"]

RULES: dict[str, type[Rule]] = {
    "fedavg": FedAvg,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "median": Median,
    "trimmed_mean": TrimmedMean,
    "krum": Krum,
    "multi_krum": MultiKrum,
    "bulyan": Bulyan,
    "rfa": GeometricMedian,
    "centered_clipping": CenteredClipping,
    "norm_clipping": NormClipping,
    "weak_dp": WeakDP,
    "dp_fedavg": DPFedAvg,
    "rlr": RobustLearningRate,
    "flame": Flame,
    "fltrust": FLTrust,
    "foolsgold": FoolsGold,
}
