"""Support vector machines on the features of all layers, one for each attack (Ma et al. 2021).

Ma et al. (arXiv 1907.10456) train a classifier on deep features of images under the attack that it
shall find. Here each attack that is learnt has its own machine, and the highest answer counts:
images at the edge of a class (DeepFool, C&W) and images far inside one (PGD) lie in different
places, and one machine for both knows either less well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from medspark.defend.detect.change_point import CENTRED, UNCENTRED
from medspark.defend.detect.detector import Detector, Training
from medspark.defend.detect.features import SMOOTHED, Features, joined
from medspark.defend.detect.rbf import rbf_kernel

__all__ = ["DeepFeatures", "SmoothedFeatures"]

# A soft margin so wide that it bounds hardly any image: in trials, 10 and 100 gave equal figures.
_PENALTY = 10.0
_LEAST = 1e-6  # deviation of a feature that varies


@dataclass(frozen=True)
class DeepFeatures(Detector):
    """The highest decision function of RBF machines: positive means attacked.

    D is the number of features of all layers, V of support vectors, A of attacks.
    """

    name = "deep"
    learns_from_attacks = True
    ignored: ClassVar[tuple[str, ...]] = (UNCENTRED, CENTRED, SMOOTHED)

    read: tuple[str, ...]
    mean: Tensor  # (D,)
    rate: Tensor  # (D,), one by the standard deviation; zero for a feature that never varies
    vectors: Tensor  # (V, D), standardised features of training images
    coefficients: Tensor  # (V, A), zero where a vector supports another machine
    intercepts: Tensor  # (A,)
    gamma: float

    @classmethod
    def fit(cls, layer: str, training: Training) -> Self:
        """Return machines that separate each attack from clean and noisy training images.

        ``layer`` is a name for all the layers that one pass gives.
        """
        read = tuple(name for name in training.reference.layers if name not in cls.ignored)
        honest = _row(joined([training.clean, training.noisy]), read)
        attacked = [_row(features, read) for features in training.attacked]
        values = torch.cat([honest, *attacked])
        mean, deviation = values.mean(0), values.std(0, correction=0)
        rate = torch.where(deviation > _LEAST, 1 / deviation, 0)
        points = (values - mean) * rate
        # As scikit-learn's gamma="scale", but equal for all machines.
        gamma = 1 / (points.shape[1] * max(float(points.var(correction=0)), _LEAST))
        numbers = torch.split(torch.arange(len(points)), [len(honest), *map(len, attacked)])
        fits = [_machine(points, numbers[0], which, gamma) for which in numbers[1:]]
        coefficients = torch.stack([column for column, _ in fits], dim=1)
        used = coefficients.abs().amax(1) > 0
        return cls(
            layer=layer,
            read=read,
            mean=mean,
            rate=rate,
            vectors=points[used],
            coefficients=coefficients[used].to(values),
            intercepts=torch.tensor([intercept for _, intercept in fits]).to(values),
            gamma=gamma,
        )

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers that were read when the detector was fitted."""
        return self.read

    def score(self, features: Features) -> Tensor:
        """Return the highest decision function of the machines, (B,)."""
        values = (_row(features, self.read) - self.mean) * self.rate
        near = rbf_kernel(values, self.vectors, self.gamma)
        return (near @ self.coefficients + self.intercepts).amax(1)


@dataclass(frozen=True)
class SmoothedFeatures(DeepFeatures):
    """The same machines, which also see how each feature changes when the image is smoothed.

    The features of an attacked image change more, because smoothing undoes a part of the attack.
    Xu et al. (2018, feature squeezing) compare the probabilities alone.
    """

    name = "smoothed"
    ignored = (UNCENTRED, CENTRED)


def _row(features: Features, read: Sequence[str]) -> Tensor:
    return torch.cat([features.layers[name] for name in read], dim=1)


def _machine(
    points: Tensor, honest: Tensor, attacked: Tensor, gamma: float
) -> tuple[Tensor, float]:
    """Return the coefficients (N,) and the intercept of a machine on some of ``points`` (N, D).

    ``honest`` and ``attacked`` hold the positions of the points that it tells apart.
    """
    from sklearn.svm import SVC

    chosen = torch.cat([honest, attacked])
    truth = torch.arange(len(chosen)) >= len(honest)
    machine = SVC(kernel="rbf", C=_PENALTY, gamma=gamma, class_weight="balanced")
    machine.fit(points[chosen].double().cpu().numpy(), truth.numpy())
    coefficients = torch.zeros(len(points), dtype=torch.float64)
    coefficients[chosen[machine.support_]] = torch.from_numpy(machine.dual_coef_[0])
    return coefficients, float(machine.intercept_[0])
