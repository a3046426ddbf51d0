"""Every detector by name, and the layers that it can look at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from medspark.defend.detect.bu import BayesianUncertainty
from medspark.defend.detect.change_point import CENTRED, UNCENTRED
from medspark.defend.detect.contrastive import Contrastive
from medspark.defend.detect.deep import DeepFeatures, SmoothedFeatures
from medspark.defend.detect.detector import ALL_LAYERS, Detector
from medspark.defend.detect.features import EMBEDDING, LOGITS, PENULTIMATE, SMOOTHED
from medspark.defend.detect.kde import KernelDensity
from medspark.defend.detect.lid import LocalDimension
from medspark.defend.detect.mahalanobis import Mahalanobis
from medspark.defend.detect.rank_pca import RankPca
from medspark.defend.detect.safetynet import SafetyNet

__all__ = ["COMPONENT_LAYERS", "DETECTORS", "grid", "layers_of"]

DETECTORS: Mapping[str, type[Detector]] = {
    cls.name: cls
    for cls in (
        KernelDensity, BayesianUncertainty, LocalDimension, SafetyNet, Mahalanobis, DeepFeatures,
        SmoothedFeatures, RankPca, Contrastive,
    )
}  # fmt: skip

# "Layers" that take many passes of their own: the two conventions of (k, p).
COMPONENT_LAYERS = (UNCENTRED, CENTRED)


def grid(names: Sequence[str], layers: Sequence[str]) -> list[tuple[str, str]]:
    """Return the (detector, layer) pairs of ``names`` that make sense, out of the tapped layers."""
    found: list[tuple[str, str]] = []
    for name in names:
        if name == "rank_pca":
            found += [(name, layer) for layer in COMPONENT_LAYERS]
        elif name in ("deep", "smoothed"):
            found.append((name, ALL_LAYERS))
        elif name == "contrastive":
            found += [(name, layer) for layer in layers if layer == EMBEDDING]
        elif name == "bu":
            found += [(name, layer) for layer in layers if layer == PENULTIMATE]
        elif name == "safetynet":
            found += [(name, layer) for layer in layers if layer != LOGITS]
        else:
            found += [(name, layer) for layer in layers]
    return found


def layers_of(pairs: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Return the layers of ``pairs`` (detector, layer), each once, and not the name of all."""
    named = (SMOOTHED if name == "smoothed" else layer for name, layer in pairs)
    return tuple(dict.fromkeys(layer for layer in named if layer != ALL_LAYERS))
