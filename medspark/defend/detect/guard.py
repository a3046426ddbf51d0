"""A guard: a fitted detector, the scores that calibrate it, and what it does with an image.

Its folder holds ``guard.safetensors`` and ``guard.json``, which is written last.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, ValidationError
from torch import nn

from medspark import __version__
from medspark.config import Config, first_problem
from medspark.defend.detect.config import Action
from medspark.defend.detect.conformal import p_values, threshold
from medspark.defend.detect.detector import Detector
from medspark.defend.detect.extract import Extractor
from medspark.defend.detect.features import Features
from medspark.defend.detect.store import StoredDetector, load_detectors, save_detectors
from medspark.documents import read_regular
from medspark.errors import UsageError
from medspark.files import sha256_of, write_whole

__all__ = ["GUARD_FILES", "Guard", "GuardCard", "guard_of", "load_guard", "save_guard"]

ARRAYS, CARD = GUARD_FILES = "guard.safetensors", "guard.json"
_LARGEST = 1 << 22  # bytes of a card


class GuardCard(Config):
    """The description of a guard. The card may come from an untrusted source."""

    schema_version: Literal[1] = 1
    detector: StoredDetector
    head: str = Field(max_length=1000, description="name of the linear layer that makes the logits")
    widths: dict[str, int] = Field(description="number of features of each layer")
    classes: int = Field(ge=2, description="number of classes of the network")
    false_positive_rate: float = Field(
        gt=0, lt=1, description="the largest p-value that is flagged"
    )
    action: Action = Field(description="whether the label of a suspicious image is withheld")
    network: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of the network's weights")
    arrays: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of the arrays' file")
    medspark: str = Field("", description="version of medspark that wrote the files")


@dataclass(frozen=True)
class Guard:
    """A detector with its calibration: scores (n,) of clean validation images."""

    detector: Detector
    calibration: npt.NDArray[np.float64]
    false_positive_rate: float
    action: Action

    @property
    def threshold(self) -> float:
        """The largest score that is not suspicious."""
        return threshold(self.calibration, self.false_positive_rate)

    def p_values(self, scores: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Return the split-conformal p-value of each score (B,)."""
        return p_values(scores, self.calibration)

    def suspicious(self, scores: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Return whether the p-value of each score (B,) is at most the false-positive rate."""
        flagged: npt.NDArray[np.bool_] = np.asarray(scores) > self.threshold
        return flagged

    def extractor(self, model: nn.Module, head: str) -> Extractor:
        """Return the extractor of the features that the detector looks at."""
        return Extractor.on(model, self.detector.layers, head)


def guard_of(model: Path) -> Path:
    """Return where a model's folder holds a guard of its own, which is served with it."""
    return model / "guard"


def save_guard(folder: Path, guard: Guard, *, features: Features, head: str, network: str) -> None:
    """Write ``guard`` to ``folder``.

    ``features`` are those of any image, ``network`` is the SHA-256 of the network's weights.
    """
    more = {"calibration": torch.from_numpy(np.asarray(guard.calibration, dtype=np.float64))}
    (described,) = save_detectors(folder / ARRAYS, [guard.detector], more)
    card = GuardCard(
        detector=described,
        head=head,
        widths={name: features.layers[name].shape[1] for name in guard.detector.layers},
        classes=features.logits.shape[1],
        false_positive_rate=guard.false_positive_rate,
        action=guard.action,
        network=network,
        arrays=sha256_of(folder / ARRAYS),
        medspark=__version__,
    )
    write_whole(folder / CARD, card.model_dump_json(indent=1) + "\n", durable=True)


def load_guard(folder: Path) -> tuple[Guard, GuardCard]:
    """Return the guard in ``folder`` and its card.

    Raises UsageError if the folder holds no guard, or files that do not fit each other.
    """
    path = folder / CARD
    try:
        card = GuardCard.model_validate_json(read_regular(path, most=_LARGEST))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"'{folder}' is not a guard: it has no {CARD}.") from error
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        raise UsageError(f"'{path}' is not valid: {first_problem(error)}.") from error
    (detector,), more = load_detectors(folder / ARRAYS, [card.detector], sha256=card.arrays)
    _check_scores(folder, detector, card)
    calibration = more.get("calibration", torch.empty(0)).double().numpy()
    return Guard(detector, calibration, card.false_positive_rate, card.action), card


def _check_scores(folder: Path, detector: Detector, card: GuardCard) -> None:
    """Raise UsageError unless the detector scores features of the widths in the card."""
    widths = {name: min(max(width, 0), 1 << 16) for name, width in card.widths.items()}
    layers = {name: torch.zeros(2, width) for name, width in widths.items()}
    try:
        scores = detector.score(Features(torch.zeros(2, card.classes), layers))
    except (RuntimeError, KeyError, IndexError) as error:
        raise UsageError(f"'{folder}' holds arrays that do not fit its card: {error}.") from None
    if scores.shape != (2,):
        raise UsageError(f"'{folder}' holds a detector that does not give one score an image.")
