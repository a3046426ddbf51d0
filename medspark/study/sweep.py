"""The records of a sweep over scales, and the curves and prices computed from all cells."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Literal, TypeVar

from pydantic import Field, model_validator

from medspark.config import Config
from medspark.study.cells import CellRecord
from medspark.study.laws import (
    Cluster,
    Fit,
    Projection,
    StepModel,
    Trend,
    efficiency,
    fit_amdahl,
    fit_usl,
    trend,
)

__all__ = [
    "ALONE",
    "Curve",
    "Price",
    "ScaleCell",
    "ScalePoint",
    "Scaling",
    "Sweep",
    "curves",
    "median",
    "prices",
]

Scaling = Literal["strong", "weak", "plain", "slice"]
# A single process without DDP. Comparing with it shows the cost of communication.
ALONE = ("plain", "slice")
K = TypeVar("K", bound=Hashable)


class ScalePoint(Config):
    """One point of the grid; the field names are the parameters of its MLflow run.

    ``scaling`` is strong (fixed global batch), weak (the global batch grows with the processes),
    plain (one process without DDP), or slice (like plain, with the batch that each process has at
    the largest number of processes).
    """

    model: str
    mode: str
    data_share: float
    scaling: Scaling
    world_size: int
    threads_per_rank: int
    repeat: int

    def __str__(self) -> str:
        return (
            f"{self.mode} on {self.world_size} x {self.threads_per_rank}, {self.scaling}, "
            f"{self.data_share:.0%} of the data, {self.model}, repeat {self.repeat}"
        )


class ScaleCell(CellRecord):
    """The record of one cell of a sweep."""

    point: ScalePoint
    fingerprint: str
    oversubscribed: bool = Field(False, description="more threads in total than cores")
    timed_only: bool = Field(False, description="trained a few steps, only to measure the speed")
    train_images: int = 0
    global_batch: int = 0
    images_per_second: float = Field(0.0, description="after the warm-up")
    data_wait_share: float = 0.0
    communication_share: float = 0.0
    efficiency: float | None = Field(None, description="relative to one process of the same repeat")
    startup: dict[str, float] = Field({}, description="seconds by part, and in total")
    peak_memory_mb: float = Field(0.0, description="of the largest rank")
    core_seconds_per_million_images: float = 0.0
    clean_auroc: float | None = None
    clean_accuracy: float | None = None
    worst_case_accuracy: float | None = None
    run_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, document: Any) -> Any:
        """Read records of earlier versions, which had other names for two fields."""
        before = {"cell": "point", "error": "failure"}
        if not isinstance(document, dict):
            return document
        return {before.get(name, name): value for name, value in document.items()}

    @property
    def headline(self) -> str:
        """The speed, in images per second."""
        return f"{self.images_per_second:.1f} images/s"

    def figures(self) -> dict[str, float]:
        """Return the scaling figures by their MLflow metric names."""
        found: dict[str, float | None] = {
            "scale/images_per_second": self.images_per_second,
            "scale/data_wait_share": self.data_wait_share,
            "scale/communication_share": self.communication_share,
            "scale/efficiency": self.efficiency,
            "scale/startup_seconds": self.startup.get("total"),
            "scale/peak_memory_mb": self.peak_memory_mb,
            "scale/core_seconds_per_million_images": self.core_seconds_per_million_images,
        }
        return {name: value for name, value in found.items() if value is not None}


class Probe(Config):
    """Constants of the machine, measured outside of training."""

    processes: int
    latency: float = Field(description="seconds per message between two ranks")
    bandwidth: float = Field(description="bytes per second between two ranks")
    loader_images_per_second: float = Field(description="reading and augmenting, per rank")


class Prediction(Config):
    """The predicted and the measured speed of a point that the fit did not use."""

    model: str
    mode: str
    scaling: Scaling
    world_size: int
    predicted: float
    measured: float
    how: str

    @property
    def error(self) -> float:
        """The relative error of the prediction; positive if it is too high."""
        return self.predicted / self.measured - 1


class Curve(Config):
    """Speed by number of processes, for one network, mode and scaling, on the largest share."""

    model: str
    mode: str
    scaling: Scaling
    data_share: float
    plain: float | None = Field(None, description="images per second of one process without DDP")
    alone: dict[int, float] = Field(
        {}, description="images per second of one process without DDP, by images in a step"
    )
    speeds: dict[int, list[float]] = Field({}, description="images per second by processes")
    oversubscribed: list[int] = Field([], description="process counts with more threads than cores")
    flagged: list[int] = Field([], description="process counts with a flagged network")
    amdahl: Fit | None = None
    usl: Fit | None = None

    @property
    def efficiencies(self) -> dict[int, float]:
        """Efficiency by number of processes, relative to the median speed of one process."""
        base = median(self.speeds.get(1, []))
        if base is None:
            return {}
        return {n: efficiency(statistics.median(v), n, base) for n, v in self.speeds.items() if v}


class Price(Config):
    """The clean AUROC that a mode loses against plain training, by size of the data."""

    model: str
    mode: str
    by_images: dict[int, list[float]] = Field(description="AUROC lost in each repeat, by images")
    trend: Trend | None
    networks: int = Field(0, description="networks of this mode and of plain training")
    left_out: int = Field(0, description="networks flagged for their predictions on clean images")
    flagged: int = Field(0, description="other networks, flagged for figures under attack only")

    @property
    def sentence(self) -> str:
        """The cost of the mode, whether it shrinks with data, and how many networks are flagged.

        The comparison leaves out networks flagged for their predictions on clean images.
        """
        text = f"{self._compared}."
        if self.left_out:
            text += f" ⚠ Flagged and left out: {self.left_out} of {self.networks} networks."
        if self.flagged:
            text += (
                f" ⚠ Flagged for figures under attack, which this comparison does not use: "
                f"{self.flagged} of {self.networks} networks."
            )
        return text

    @property
    def _compared(self) -> str:
        if not self.by_images:
            return f"{self.model}: the cost of {self.mode} in clean AUROC is unknown"
        sizes = sorted(self.by_images)
        each = [f"{_price(self.by_images[size])} on {size} images" for size in sizes]
        seen = f"{self.model}: in clean AUROC, {self.mode} {each[0]}"
        if self.trend is None:
            return f"{seen}; one size of data shows no trend"
        seen = f"{seen} and {each[-1]}"
        repeats = f"{self.trend.repeats} repeat{'s' if self.trend.repeats > 1 else ''}"
        if self.trend.interval is None:
            return f"{seen}; {repeats} cannot tell a trend from chance"
        low, high = self.trend.interval
        change = (
            f"{self.trend.slope:+.3f} for each tenfold of data, 95 % interval "
            f"[{low:+.3f}, {high:+.3f}], {repeats}"
        )
        verdict = {
            "falls": "the price of robustness shrank with data",
            "rises": "the price of robustness grew with data",
            "unclear": "this does not show whether the price of robustness shrinks with data",
        }
        return f"{seen} ({change}): {verdict[self.trend.direction]}"


class Sweep(Config):
    """A whole sweep: the content of its report, and of comparisons with other sweeps."""

    name: str
    command: str
    hardware: str
    dataset: str
    dataset_digest: str
    cells: list[ScaleCell]
    curves: list[Curve] = Field([])
    prices: list[Price] = Field([])
    probe: Probe | None = None
    step_models: dict[str, StepModel] = Field({}, description="by network and mode")
    predictions: list[Prediction] = Field([])
    cluster: Cluster = Cluster()
    projections: dict[str, list[Projection]] = Field({}, description="by network and mode")

    @property
    def finished(self) -> list[ScaleCell]:
        """The finished cells."""
        return [cell for cell in self.cells if cell.finished]

    @property
    def sentences(self) -> list[str]:
        """The findings on the price of robustness, one sentence per mode and network."""
        return [price.sentence for price in self.prices]


def curves(cells: Iterable[ScaleCell]) -> list[Curve]:
    """Return speed by number of processes, with fitted laws, per network, mode and scaling."""
    found = []
    for (model, mode), group in _grouped(cells, lambda m: (m.point.model, m.point.mode)).items():
        share = max(m.point.data_share for m in group)
        largest = [m for m in group if m.point.data_share == share]
        plain = [m for m in largest if m.point.scaling in ALONE]
        alone = [m for m in largest if m.point.world_size == 1 and m.point.scaling not in ALONE]
        for scaling in ("strong", "weak"):
            several = [m for m in largest if m.point.scaling == scaling and m.point.world_size > 1]
            if several or (alone and scaling == alone[0].point.scaling):
                found.append(
                    _curve(
                        [*alone, *several],
                        Curve(
                            model=model,
                            mode=mode,
                            scaling=scaling,  # type: ignore[arg-type]
                            data_share=share,
                            plain=median(
                                [m.images_per_second for m in plain if m.point.scaling == "plain"]
                            ),
                            alone={
                                batch: statistics.median(m.images_per_second for m in group)
                                for batch, group in _grouped(plain, _batch).items()
                            },
                        ),
                    )
                )
    return found


def _curve(cells: Sequence[ScaleCell], empty: Curve) -> Curve:
    speeds: dict[int, list[float]] = {}
    for measured in sorted(cells, key=lambda m: m.point.world_size):
        speeds.setdefault(measured.point.world_size, []).append(measured.images_per_second)
    crowded = sorted({m.point.world_size for m in cells if m.oversubscribed})
    # Processes that share a core would distort the laws.
    uncrowded = {n: v for n, v in speeds.items() if n not in crowded}
    return empty.model_copy(
        update={
            "speeds": speeds,
            "oversubscribed": crowded,
            "flagged": sorted({m.point.world_size for m in cells if m.flagged}),
            "amdahl": fit_amdahl(uncrowded),
            "usl": fit_usl(uncrowded),
        }
    )


def prices(cells: Iterable[ScaleCell]) -> list[Price]:
    """Return the clean AUROC that each mode loses against standard training, paired by repeat."""
    judged = [m for m in cells if m.clean_auroc is not None and m.point.scaling not in ALONE]
    found = []
    for model, mode in dict.fromkeys((m.point.model, m.point.mode) for m in judged):
        group = [m for m in judged if m.point.model == model and m.point.mode in (mode, "standard")]
        if mode == "standard" or all(m.point.mode == mode for m in group):
            continue
        trusted = [m for m in group if not m.clean_flagged]
        lost = _lost(trusted, mode)
        if lost or len(trusted) < len(group):
            sizes = sorted({size for series in lost for size in series})
            found.append(
                Price(
                    model=model,
                    mode=mode,
                    by_images={n: [s[n] for s in lost if n in s] for n in sizes},
                    trend=trend(lost),
                    networks=len(group),
                    left_out=len(group) - len(trusted),
                    flagged=sum(m.flagged for m in trusted),
                )
            )
    return found


def _lost(cells: Sequence[ScaleCell], mode: str) -> list[dict[float, float]]:
    """Return, per repeat, the AUROC that ``mode`` loses against standard training, by images."""
    auroc = {
        key: statistics.fmean(m.clean_auroc or 0.0 for m in group)
        for key, group in _grouped(
            cells, lambda m: (m.point.mode, m.point.data_share, m.point.repeat)
        ).items()
    }
    lost: dict[int, dict[float, float]] = {}
    for (trained, share, repeat), value in auroc.items():
        plain = auroc.get(("standard", share, repeat))
        if trained == mode and plain is not None:
            images = round(_mean_images(cells, share))
            lost.setdefault(repeat, {})[images] = plain - value
    return list(lost.values())


def median(values: Sequence[float]) -> float | None:
    """Return the median, or None if there are no values."""
    return statistics.median(values) if values else None


def _mean_images(cells: Sequence[ScaleCell], share: float) -> float:
    return statistics.fmean(m.train_images for m in cells if m.point.data_share == share)


def _batch(measured: ScaleCell) -> int:
    return measured.global_batch


def _grouped(cells: Iterable[ScaleCell], key: Callable[[ScaleCell], K]) -> dict[K, list[ScaleCell]]:
    groups: dict[K, list[ScaleCell]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return groups


def _price(losses: Sequence[float]) -> str:
    lost = statistics.fmean(losses)
    return f"{'gained' if lost < 0 else 'cost'} {abs(lost):.3f}"
