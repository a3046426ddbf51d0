"""Sum the reports of training steps over the ranks and write them to the journal."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Protocol

import torch

from medspark.train.engine import Report
from medspark.train.world import World

__all__ = ["Meter", "Recorder"]


class Recorder(Protocol):
    """The destination of metrics; only rank 0's are stored."""

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Store the ``metrics`` of ``step``."""


class Meter:
    """Sums the reports of all ranks and writes them to the journal, for several steps at once.

    Reports stay on the device until ``publish``, which sums them over ranks in one collective. A
    step itself has no collective except that of its gradients.
    """

    def __init__(self, world: World, journal: Recorder) -> None:
        self._world = world
        self._journal = journal
        self._reports: list[Report] = []
        self._waited_before = 0.0
        self._window_began = time.perf_counter()
        self._right = torch.zeros(3)
        self.images = self.steps = 0
        self.seconds = 0.0
        self.waited = 0.0
        self._records: list[tuple[int, float]] = []  # steps and seconds of each record

    def begin(self) -> None:
        """Start the clock; time before this call, such as a validation, does not count."""
        self._window_began = time.perf_counter()
        self._waited_before = 0.0

    def take_accuracies(self) -> tuple[float, float]:
        """Return the accuracies on clean and on attacked training images since the last call."""
        clean, attacked, images = self._right.tolist()
        self._right = torch.zeros(3)
        return clean / max(images, 1), attacked / max(images, 1)

    def add(self, report: Report) -> None:
        """Add the report of one step."""
        self._reports.append(report)

    def publish(self, step: int, epoch: int, *, waited: float = 0.0) -> None:
        """Record the steps since the last call.

        ``step`` is the number of steps taken so far. ``waited`` is the number of seconds that this
        rank has waited for data since ``begin``.
        """
        if not self._reports:
            return
        # Reading the figures waits for the device, so read the clock afterwards.
        figures = self._world.sum(torch.stack([report.figures for report in self._reports])).cpu()
        norms = torch.stack([report.gradient_norm for report in self._reports]).tolist()
        now = time.perf_counter()
        seconds, wait = now - self._window_began, waited - self._waited_before
        images = int(figures[:, 3].sum())
        self._right += figures[:, 1:].sum(0)
        self.images, self.seconds = self.images + images, self.seconds + seconds
        self.steps += len(self._reports)
        self.waited += wait
        self._records.append((len(self._reports), seconds))
        speed = {"images_per_second": images / seconds, "data_wait_share": wait / seconds}
        first = step - len(self._reports) + 1
        read = zip(self._reports, figures.tolist(), norms, strict=True)
        for offset, (report, row, norm) in enumerate(read):
            last = first + offset == step
            metrics = _step_metrics(report, row) | {"gradient_norm": norm, "epoch": epoch}
            self._journal.record(first + offset, metrics | (speed if last else {}))
        self._reports = []
        self._window_began, self._waited_before = now, waited

    @property
    def images_per_second(self) -> float:
        """Images per second of training, summed over all ranks."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def seconds_per_step(self) -> float:
        """The mean duration of a step, without pauses.

        Libraries choose their kernels in the first step, which takes several times as long: the
        steps up to the first record do not count if there are others. Steps that took over twice
        the median of all records, because something else held the machine, count as the median.
        """
        records = self._records[1:] or self._records
        if not records:
            return 0.0
        usual = statistics.median(seconds / steps for steps, seconds in records)
        counted = [s if s <= 2 * usual * steps else usual * steps for steps, s in records]
        return sum(counted) / sum(steps for steps, _ in records)

    def share_of_step(self, seconds: float) -> float:
        """Return ``seconds`` divided by the mean duration of a step."""
        return seconds * self.steps / self.seconds if self.seconds else 0.0

    @property
    def wait_share(self) -> float:
        """The share of this rank's training time spent waiting for data."""
        return self.waited / self.seconds if self.seconds else 0.0


def _step_metrics(report: Report, figures: list[float]) -> dict[str, float]:
    loss, clean, attacked, images = figures
    return {
        "loss": loss,
        "train/clean_accuracy": clean / images,
        "train/attacked_accuracy": attacked / images,
        "lr": report.rate,
        "eps": report.eps,
    }
