"""Choose among quantised graphs: the fastest of those that keep the answers of the float graph."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from medspark.export.judge import Judge, Verdict
from medspark.export.layers import layer_errors
from medspark.export.runtime import Run
from medspark.models.card import GraphFile
from medspark.models.prediction import Floats

__all__ = ["Attempt", "Candidate", "Choice", "choose"]

_LOGGER = logging.getLogger(__name__)

_TURNS = 30
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
    verdicts: tuple[Verdict, ...] = ()  # of each judge
    milliseconds: float = float("nan")

    @property
    def keeps_answers(self) -> bool:
        """Whether the graph answers as the float graph does, on every judge's images."""
        return all(verdict.keeps_answers for verdict in self.verdicts)

    @property
    def agreement(self) -> float:
        """The smallest share of images with the float graph's answer, of any judge."""
        return min((verdict.agreement for verdict in self.verdicts), default=1.0)

    def __str__(self) -> str:
        same = ", ".join(f"{verdict.agreement:.1%}" for verdict in self.verdicts)
        fall = max((verdict.fall for verdict in self.verdicts), default=0.0)
        return (
            f"{self.numbers}: {self.milliseconds:.2f} ms, the same answers to {same} of the "
            f"validation images, accuracy {-fall:+.3f}"
        )


@dataclass(frozen=True)
class Choice:
    """The chosen graph, all that were tried, and the errors of layers if they were looked for."""

    chosen: Candidate
    tried: tuple[Candidate, ...]
    layers: dict[str, float]


# Yields the graphs of one attempt.
Make = Callable[[Attempt], Iterator[Candidate]]


def choose(make: Make, judges: Sequence[Judge], *, prepared: bytes) -> Choice:
    """Return the fastest graph that keeps the answers of ``prepared``, the float graph.

    Every judge has to find them kept. If that is so for no graph, more and more layers stay in
    float: those with the largest errors. If still none does, the graph with the most agreement is
    chosen.
    """
    images = judges[0].images

    def tries(attempt: Attempt) -> list[Candidate]:
        judged = [
            replace(each, verdicts=tuple(judge.verdict(each.run) for judge in judges))
            for each in make(attempt)
        ]
        return _timed(judged, images[:1])

    tried = tries(Attempt())
    if found := _fastest(tried):
        return Choice(found, tuple(tried), {})
    closest = max(tried, key=lambda each: each.agreement)
    layers = layer_errors(prepared, closest.surrogate, torch.from_numpy(images[:_DEBUG_IMAGES]))
    for count in _LAYERS_IN_FLOAT:
        tried += tries(Attempt(tuple(layers)[:count]))
        if found := _fastest(tried):
            return Choice(found, tuple(tried), layers)
    return Choice(max(tried, key=lambda each: each.agreement), tuple(tried), layers)


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
