"""Choose among quantised graphs: the fastest of those that keep the answers of the float graph."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from medspark.evaluate.answers import Answers, answers_of
from medspark.export.layers import layer_errors
from medspark.export.runtime import Run
from medspark.models.card import GraphFile
from medspark.models.prediction import Floats, probabilities_of

__all__ = [
    "LEAST_AGREEMENT", "MOST_FALL", "Attempt", "Candidate", "Choice", "Judge", "choose",
    "in_batches",
]  # fmt: skip

_LOGGER = logging.getLogger(__name__)

LEAST_AGREEMENT = 0.99  # share of images with the same answer as the float graph
MOST_FALL = 0.005  # of the accuracy on them
_TURNS, _BATCH = 30, 32
_ERRORS = 300  # at most
_DEBUG_IMAGES = 64
# Layers that may stay in float, beginning with those that cause the largest error.
_LAYERS_IN_FLOAT = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Attempt:
    """What is changed until a graph keeps its answers: more and more layers stay in float.

    Ranges by percentile or entropy are not tried: they changed nothing on X-rays and blood cells.
    """

    keep_float: tuple[str, ...] = ()

    def __str__(self) -> str:
        count = len(self.keep_float)
        return f"{count} layer{'s' if count > 1 else ''} in float" if count else "all layers"


@dataclass(frozen=True)
class Candidate:
    """A quantised graph, and how it did on the validation images."""

    numbers: str  # the format of weights and activations
    files: dict[GraphFile, bytes]
    run: Run
    surrogate: bytes  # the same numbers in the form QDQ, for attacks by gradients
    agreement: float = 0.0
    fall: float = 1.0
    milliseconds: float = float("nan")

    @property
    def keeps_answers(self) -> bool:
        """Whether the graph answers as the float graph does, on validation images."""
        return self.agreement >= LEAST_AGREEMENT and self.fall <= MOST_FALL

    def __str__(self) -> str:
        return (
            f"{self.numbers}: {self.milliseconds:.2f} ms, {self.agreement:.1%} the same answers, "
            f"accuracy {-self.fall:+.3f}"
        )


@dataclass(frozen=True)
class Choice:
    """The chosen graph, all that were tried, and the errors of layers if they were looked for."""

    chosen: Candidate
    tried: tuple[Candidate, ...]
    layers: dict[str, float]


@dataclass(frozen=True)
class Judge:
    """The validation images (N, C, H, W), their labels, and the float graph's logits (N, K)."""

    images: Floats
    labels: npt.NDArray[np.generic]
    logits: Floats

    def judged(self, candidate: Candidate) -> Candidate:
        """Return ``candidate`` with its agreement with the float graph, and its fall.

        The agreement is that of the logits of each image with the error of every image, so that a
        few hundred images tell one percent.
        """
        logits = in_batches(candidate.run, self.images)
        found, wanted = self._answers(logits), self._answers(self.logits)
        same = [
            (self._answers(self.logits + error).predicted == wanted.predicted).all(1).mean()
            for error in (logits - self.logits)[:_ERRORS]
        ]
        fall = float(wanted.right.mean()) - float(found.right.mean())
        return replace(candidate, agreement=float(np.mean(same)), fall=fall)

    def _answers(self, logits: Floats) -> Answers:
        multi_label = self.labels.ndim == 2
        return answers_of(self.labels, probabilities_of(logits, multi_label=multi_label))


# Yields the graphs of one attempt.
Make = Callable[[Attempt], Iterator[Candidate]]


def choose(make: Make, judge: Judge, *, prepared: bytes) -> Choice:
    """Return the fastest graph that keeps the answers of ``prepared``, the float graph.

    If none does, more and more layers stay in float: those with the largest errors. If still none
    does, the graph with the most agreement is chosen.
    """
    tried = _timed([judge.judged(each) for each in make(Attempt())], judge.images[:1])
    if found := _fastest(tried):
        return Choice(found, tuple(tried), {})
    closest = max(tried, key=lambda each: each.agreement)
    layers = layer_errors(
        prepared, closest.surrogate, torch.from_numpy(judge.images[:_DEBUG_IMAGES])
    )
    for count in _LAYERS_IN_FLOAT:
        attempt = Attempt(tuple(layers)[:count])
        tried += _timed([judge.judged(each) for each in make(attempt)], judge.images[:1])
        if found := _fastest(tried):
            return Choice(found, tuple(tried), layers)
    return Choice(max(tried, key=lambda each: each.agreement), tuple(tried), layers)


def in_batches(run: Run, images: Floats) -> Floats:
    """Return the logits (N, K) of ``images`` (N, C, H, W), computed in batches."""
    parts = [run(images[at : at + _BATCH]) for at in range(0, len(images), _BATCH)]
    return np.concatenate(parts).astype(np.float32)


def _fastest(tried: Sequence[Candidate]) -> Candidate | None:
    keeping = [each for each in tried if each.keeps_answers]
    return min(keeping, key=lambda each: each.milliseconds, default=None)


def _timed(candidates: Sequence[Candidate], image: Floats) -> list[Candidate]:
    """Return ``candidates`` with the median time of one image, measured by turns."""
    seconds: list[list[float]] = [[] for _ in candidates]
    for turn in range(_TURNS + 3):
        for each, taken in zip(candidates, seconds, strict=True):
            began = time.perf_counter()
            each.run(image)
            if turn >= 3:  # the first ones prepare the memory
                taken.append(time.perf_counter() - began)
    found = [
        replace(each, milliseconds=1000 * statistics.median(taken))
        for each, taken in zip(candidates, seconds, strict=True)
    ]
    for each in found:
        _LOGGER.info("%s", each)
    return found
