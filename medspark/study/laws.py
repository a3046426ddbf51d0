"""Compute scaling: efficiency, fitted laws with their uncertainty, and projections from them.

All functions are pure arithmetic.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy import stats

from medspark.config import Config
from medspark.seeding import derive

__all__ = [
    "Cluster",
    "Fit",
    "Interval",
    "Projection",
    "StepModel",
    "Trend",
    "all_reduce_constants",
    "efficiency",
    "fit_amdahl",
    "fit_usl",
    "project",
    "steady",
    "trend",
    "usl",
]

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]
Bound = Literal["compute", "network", "storage", "start-up", "batch"]

_LEVEL = 0.95


class Steady(NamedTuple):
    """Speed after the warm-up: images per second, and the share of time spent waiting for data."""

    images_per_second: float
    data_wait_share: float


class Window(NamedTuple):
    """One report of a run: its speed over the steps since the previous report, up to ``step``."""

    step: int
    images_per_second: float
    data_wait_share: float


def steady(windows: Sequence[Window], *, warmup_steps: int) -> Steady | None:
    """Return the speed over the windows that begin after ``warmup_steps``; None without windows.

    If all windows lie in the warm-up, the last one counts.
    """
    ordered = sorted(windows)
    if not ordered:
        return None
    begins = [0, *(window.step for window in ordered[:-1])]
    kept = [(w, w.step - b) for w, b in zip(ordered, begins, strict=True) if b >= warmup_steps]
    kept = kept or [(ordered[-1], 1)]
    # All steps have the same number of images to within one, so a window counts by its steps.
    images = sum(steps for _, steps in kept)
    seconds = sum(steps / window.images_per_second for window, steps in kept)
    waited = sum(
        steps / window.images_per_second * window.data_wait_share for window, steps in kept
    )
    return Steady(images / seconds, waited / seconds)


def efficiency(throughput: float, processes: int, base: float) -> float:
    """Return ``throughput`` over ``processes`` times ``base``, the speed of one process."""
    return throughput / (processes * base)


def usl(
    processes: npt.ArrayLike, *, base: float, contention: float, coherency: float = 0.0
) -> Floats:
    """Return images per second by the universal scalability law (Gunther 2007).

    With ``coherency`` 0 it is Amdahl's law (1967), and ``contention`` is the serial part.
    """
    n = np.asarray(processes, dtype=float)
    speed: Floats = base * n / (1 + contention * (n - 1) + coherency * n * (n - 1))
    return speed


class Fit(Config):
    """A fitted law: its parameters, and their 95 % intervals from resampling the repeats."""

    law: Literal["amdahl", "usl"]
    base: float = Field(description="images per second of one process")
    contention: float = Field(description="serial part")
    coherency: float = Field(0.0, description="cost of coordination per pair of processes")
    intervals: dict[str, Interval] = Field({}, description="95 % intervals by parameter")
    largest_residual: float = Field(description="largest relative error at a measured median")

    def speed(self, processes: npt.ArrayLike) -> Floats:
        """Return images per second on ``processes`` processes."""
        return usl(processes, base=self.base, contention=self.contention, coherency=self.coherency)

    @property
    def best_processes(self) -> float:
        """The number of processes with the highest speed."""
        if self.coherency <= 0:
            return math.inf
        return math.sqrt(max(1 - self.contention, 0) / self.coherency)


Points = Mapping[int, Sequence[float]]


def fit_amdahl(points: Points, *, resamples: int = 500) -> Fit | None:
    """Return Amdahl's law fitted to images per second by process count; None for one count."""
    return _fit("amdahl", points, 2, resamples)


def fit_usl(points: Points, *, resamples: int = 500) -> Fit | None:
    """Return the universal scalability law fitted to ``points``; None below three counts."""
    return _fit("usl", points, 3, resamples)


def _fit(law: Literal["amdahl", "usl"], points: Points, terms: int, resamples: int) -> Fit | None:
    points = {n: values for n, values in sorted(points.items()) if values}
    if len(points) < terms:
        return None
    best = _solve(points, terms)
    random = np.random.default_rng(derive(0, "scaling", law))
    drawn = [
        _solve({n: list(random.choice(v, len(v))) for n, v in points.items()}, terms)
        for _ in range(resamples)
    ]
    names = ("base", "contention", "coherency")[:terms]
    tails = 100 * np.array([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    intervals = {
        name: (float(low), float(high))
        for name, (low, high) in zip(names, np.percentile(drawn, tails, axis=0).T, strict=True)
    }
    figures = dict(zip(names, best, strict=True))
    medians = np.array([statistics.median(values) for values in points.values()])
    off = usl(list(points), **({"contention": 0.0} | figures)) / medians - 1
    return Fit(law=law, **figures, intervals=intervals, largest_residual=float(np.abs(off).max()))


def _solve(points: Points, terms: int) -> tuple[float, ...]:
    """Return base, contention, coherency: least squares of relative errors in seconds per image.

    N / R(N) is linear in 1 / base, contention / base and coherency / base. None is negative.
    """
    counts = np.array([n for n, values in points.items() for _ in values], dtype=float)
    seconds = counts / np.concatenate([np.asarray(v, dtype=float) for v in points.values()])
    columns = [np.ones_like(counts), counts - 1, counts * (counts - 1)][:terms]
    found = _non_negative(np.stack(columns, axis=1) / seconds[:, None], np.ones_like(seconds))
    return (float(1 / found[0]), *(float(value / found[0]) for value in found[1:]))


def _non_negative(matrix: Floats, target: Floats) -> Floats:
    """Return the non-negative least-squares solution; its first entry is always positive."""
    best, least = np.zeros(matrix.shape[1]), math.inf
    others = range(1, matrix.shape[1])
    for count in range(matrix.shape[1]):
        for chosen in itertools.combinations(others, count):
            used = [0, *chosen]
            part, *_ = np.linalg.lstsq(matrix[:, used], target, rcond=None)
            residual = float(((matrix[:, used] @ part - target) ** 2).sum())
            if (part >= 0).all() and residual < least - 1e-12:
                best, least = np.zeros(matrix.shape[1]), residual
                best[used] = part
    return best


def all_reduce_constants(
    processes: int, timed: Iterable[tuple[float, float]]
) -> tuple[float, float]:
    """Return (seconds per message, bytes per second) of a ring all-reduce from (bytes, seconds).

    t = 2 (N - 1) / N * bytes / bandwidth + 2 (N - 1) * latency, by least squares of relative
    errors. Raises ValueError for fewer than two processes.
    """
    if processes < 2:
        raise ValueError("an all-reduce needs two processes")
    sizes, seconds = np.array(list(timed), dtype=float).T
    matrix = np.stack(
        [
            np.full_like(sizes, 2 * (processes - 1)),
            2 * (processes - 1) / processes * sizes,
        ],
        axis=1,
    )
    latency, per_byte = _non_negative(matrix / seconds[:, None], np.ones_like(seconds))
    return float(latency), float(1 / max(per_byte, 1e-15))


class StepModel(Config):
    """Seconds of a training step: compute, the exposed part of the all-reduce, and the loader."""

    seconds_per_image: float = Field(gt=0, description="forward, attack and backward pass")
    seconds_per_step: float = Field(0.0, ge=0, description="fixed time of a step")
    gradient_bytes: float = Field(gt=0, description="size of the gradients that a process sends")
    overlap: float = Field(
        0.5, ge=0, le=1, description="share of the compute time that the all-reduce can overlap"
    )
    loader_images_per_second: float = Field(
        math.inf, gt=0, description="speed of reading and augmenting, per process"
    )
    image_bytes: float = Field(0.0, ge=0, description="size of a stored image")

    def compute(self, batch: float) -> float:
        """Return the seconds that one process computes for ``batch`` images."""
        return self.seconds_per_step + self.seconds_per_image * batch

    def all_reduce(self, processes: int, cluster: Cluster) -> float:
        """Return the seconds of a ring all-reduce among ``processes``."""
        if processes == 1:
            return 0.0
        moved = 2 * (processes - 1) / processes * self.gradient_bytes
        return moved / cluster.bandwidth + 2 * (processes - 1) * cluster.latency

    def loading(self, processes: int, batch: float, cluster: Cluster) -> float:
        """Return the seconds until ``batch`` images per process have been read."""
        own = batch / self.loader_images_per_second
        return max(own, processes * batch * self.image_bytes / cluster.storage)

    def step(self, processes: int, batch: float, cluster: Cluster) -> tuple[float, Bound]:
        """Return the seconds of a step with ``batch`` images per process, and its bottleneck.

        Reading overlaps computing. The all-reduce overlaps the share ``overlap`` of computing.
        """
        compute = self.compute(batch)
        exposed = max(0.0, self.all_reduce(processes, cluster) - self.overlap * compute)
        loading = self.loading(processes, batch, cluster)
        if loading > compute + exposed:
            return loading, "storage"
        return compute + exposed, "network" if exposed > compute else "compute"

    def speed(self, processes: int, batch: float, cluster: Cluster) -> float:
        """Return images per second of all ``processes`` with ``batch`` images each in a step."""
        return processes * batch / self.step(processes, batch, cluster)[0]


class Cluster(Config):
    """The cluster of a projection: network, storage and price. The defaults are assumptions."""

    bandwidth: float = Field(1.25e9, gt=0, description="bytes per second between two processes")
    latency: float = Field(5e-5, ge=0, description="seconds per message")
    storage: float = Field(
        2e9, gt=0, description="bytes per second that all processes together read"
    )
    startup_seconds: float = Field(60.0, ge=0, description="from submission to the first step")
    price: float = Field(1.0, ge=0, description="price of one process for an hour")


class Projection(Config):
    """The projected time and cost of a training, by images and nodes."""

    nodes: int
    images: float = Field(description="images of the dataset")
    batch: int = Field(description="images per process in a step")
    images_per_second: float
    efficiency: float = Field(description="speed over that of perfect scaling, without start-up")
    hours: float = Field(description="from submission to the last step")
    cost: float
    bound: Bound = Field(description="main cause of the time beyond perfect scaling")
    advice: str


_ADVICE: dict[Bound, str] = {
    "compute": "more or faster nodes shorten the training nearly in proportion",
    "network": "a larger batch per process, a faster network, or fewer nodes",
    "storage": "copy the shards to local disks first (data.cache_dir)",
    "start-up": "fewer nodes: the training is shorter than its start-up",
    "batch": "fewer nodes, or a larger train.batch_size with a matching learning rate: the largest "
    "global batch leaves only a few images per node",
}


def project(
    model: StepModel,
    cluster: Cluster,
    *,
    nodes: int,
    images: float,
    epochs: int,
    batch: int,
    largest_batch: int,
) -> Projection:
    """Return the projection of ``epochs`` over ``images`` on ``nodes``, with one process each.

    A process takes ``batch`` images per step, or fewer if the global batch would exceed
    ``largest_batch``. Training with larger global batches gives worse weights.
    """
    own = max(1, min(batch, largest_batch // nodes))
    seconds, bound = model.step(nodes, own, cluster)
    speed = nodes * own / seconds
    ideal = model.speed(1, batch, cluster)
    training = images * epochs / speed
    if cluster.startup_seconds > training:
        bound = "start-up"
    elif own < batch and bound == "network":
        bound = "batch"
    total = training + cluster.startup_seconds
    return Projection(
        nodes=nodes,
        images=images,
        batch=own,
        images_per_second=speed,
        efficiency=efficiency(speed, nodes, ideal),
        hours=total / 3600,
        cost=nodes * total / 3600 * cluster.price,
        bound=bound,
        advice=_ADVICE[bound],
    )


class Trend(Config):
    """The slope of a figure per tenfold of images, with a 95 % interval."""

    slope: float
    interval: Interval | None = Field(None, description="None for a single repeat")
    repeats: int

    @property
    def direction(self) -> Literal["falls", "rises", "unclear"]:
        """The sign of the slope, or "unclear" if its interval contains zero."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return "unclear"
        return "falls" if self.slope < 0 else "rises"


def trend(series: Sequence[Mapping[float, float]]) -> Trend | None:
    """Return the trend of several series of {images: figure}, one for each repeat.

    The slope over log10 of the images is fitted within each series. The interval is Student's, of
    the mean slope. Returns None if no series has two sizes.
    """
    slopes = [
        float(np.polyfit(np.log10(list(one)), list(one.values()), 1)[0])
        for one in series
        if len(one) > 1
    ]
    if not slopes:
        return None
    mean, interval = mean_interval(slopes)
    return Trend(slope=mean, interval=interval, repeats=len(slopes))


def mean_interval(values: Sequence[float]) -> tuple[float, Interval | None]:
    """Return the mean and its Student's 95 % interval, which is None for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    reach = float(stats.t.ppf((1 + _LEVEL) / 2, len(values) - 1))
    half = reach * statistics.stdev(values) / math.sqrt(len(values))
    return mean, (mean - half, mean + half)
