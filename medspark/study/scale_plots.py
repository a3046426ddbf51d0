"""Draw the figures of a sweep: speed, efficiency, robustness, start-up and projections."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import ColorType

from medspark.evaluate.sanity import HOLLOW_MEANS
from medspark.study.laws import Projection, mean_interval
from medspark.study.sweep import Curve, ScaleCell, Sweep

__all__ = ["figures_of"]


def figures_of(sweeps: Sequence[Sweep]) -> dict[str, Figure]:
    """Return the figures, by title, of one sweep or of several in the same axes."""
    drawn = {
        "throughput": _throughput(sweeps),
        "efficiency": _efficiency(sweeps),
        "robustness": _robustness(sweeps),
        "startup": _startup(sweeps),
    }
    for sweep in sweeps if len(sweeps) == 1 else ():
        for name, projections in sweep.projections.items():
            drawn[f"projection {name}"] = _projection(name, projections)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _throughput(sweeps: Sequence[Sweep]) -> Figure | None:
    figure, axes = _blank("processes", "images/s")
    for label, curve in _labelled(sweeps):
        counts = list(curve.speeds)
        middle = [statistics.median(curve.speeds[n]) for n in counts]
        (line,) = axes.plot(counts, middle, label=label)
        _mark(axes, dict(zip(counts, middle, strict=True)), curve.flagged, line.get_color())
        for n in counts:
            speeds = curve.speeds[n]
            shape = "x" if n in curve.oversubscribed else "."
            axes.plot([n] * len(speeds), speeds, shape, color=line.get_color(), alpha=0.5)
        axes.plot(counts, [middle[0] * n / counts[0] for n in counts], ":", color=line.get_color())
    axes.set_title("dotted: perfect scaling; ×: more threads than cores", fontsize=9)
    return _with_legend(figure, axes)


def _efficiency(sweeps: Sequence[Sweep]) -> Figure | None:
    figure, axes = _blank("processes", "efficiency")
    for label, curve in _labelled(sweeps):
        found = curve.efficiencies
        (line,) = axes.plot(list(found), list(found.values()), label=label)
        _mark(axes, found, curve.flagged, line.get_color())
    axes.axhline(1.0, color="grey", lw=1, ls=":")
    axes.set_ylim(0, 1.15)
    return _with_legend(figure, axes)


def _robustness(sweeps: Sequence[Sweep]) -> Figure | None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, title in (
        (left, "clean_auroc", "clean AUROC"),
        (right, "worst_case_accuracy", "worst-case accuracy"),
    ):
        _style(axes, "training images", f"{title} on the test images")
        axes.set_xscale("log")
        # A share holds whole patients, so repeats differ by a few images.
        sizes = {m.point.data_share: m.train_images for sweep in sweeps for m in sweep.finished}
        axes.set_xticks(list(sizes.values()), [f"{size:,}" for size in sizes.values()])
        axes.set_xticks([], minor=True)
        for sweep in sweeps:
            _draw_series(axes, sweep, name, several=len(sweeps) > 1)
    return _with_legend(figure, left)


def _draw_series(axes: Axes, sweep: Sweep, name: str, *, several: bool) -> None:
    series: dict[str, dict[float, list[ScaleCell]]] = {}
    for m in sweep.finished:
        if getattr(m, name) is not None:
            by_share = series.setdefault(f"{m.point.model} {m.point.mode}", {})
            by_share.setdefault(m.point.data_share, []).append(m)
    images = {m.point.data_share: m.train_images for m in sweep.finished}
    for label, by_share in series.items():
        drawn = {images[share]: by_share[share] for share in sorted(by_share)}
        values = [[getattr(m, name) for m in cells] for cells in drawn.values()]
        means = [mean_interval(repeats)[0] for repeats in values]
        line, *_ = axes.errorbar(
            list(drawn), means, yerr=[np.std(repeats) for repeats in values], capsize=3,
            label=f"{sweep.name}: {label}" if several else label,
        )  # fmt: skip
        flagged = [size for size, cells in drawn.items() if any(m.flagged for m in cells)]
        _mark(axes, dict(zip(drawn, means, strict=True)), flagged, line.get_color())


def _mark(
    axes: Axes, points: Mapping[int, float], flagged: Collection[int], color: ColorType
) -> None:
    """Draw ``points``, y by x; the ``flagged`` ones are hollow, and a label explains that.

    A point over several repeats is flagged if one of its networks is.
    """
    for x, y in points.items():
        axes.plot([x], [y], "o", ms=5, color=color, mfc="white" if x in flagged else color)
    if any(x in flagged for x in points):
        axes.figure.supxlabel(HOLLOW_MEANS, fontsize=8)


def _startup(sweeps: Sequence[Sweep]) -> Figure | None:
    bars: dict[str, dict[str, float]] = {}
    for sweep in sweeps:
        for world in sorted({m.point.world_size for m in sweep.finished}):
            cells = [m for m in sweep.finished if m.point.world_size == world]
            parts = [part for part in cells[0].startup if part != "total"]
            name = f"{sweep.name}, {world}" if len(sweeps) > 1 else f"{world} processes"
            bars[name] = {
                part: statistics.median(m.startup.get(part, 0.0) for m in cells) for part in parts
            }
    figure, axes = _blank("seconds from the launch of the ranks to the first step", "")
    for part in dict.fromkeys(part for parts in bars.values() for part in parts):
        before = [sum(_before(parts, part)) for parts in bars.values()]
        widths = [parts.get(part, 0.0) for parts in bars.values()]
        axes.barh(list(bars), widths, left=before, label=part.replace("_", " "))
    return _with_legend(figure, axes)


def _before(parts: Mapping[str, float], part: str) -> list[float]:
    names = list(parts)
    return [parts[name] for name in names[: names.index(part)]] if part in parts else []


def _projection(name: str, projections: Sequence[Projection]) -> Figure:
    figure, axes = _blank("nodes", "hours, start-up included")
    axes.set(xscale="log", yscale="log", title=name)
    marks = {"compute": "o", "network": "s", "storage": "^", "start-up": "x", "batch": "D"}
    for images in sorted({p.images for p in projections}):
        row = [p for p in projections if p.images == images]
        label = f"{images:.0e} images"
        (line,) = axes.plot([p.nodes for p in row], [p.hours for p in row], label=label)
        for p in row:
            axes.plot(p.nodes, p.hours, marks[p.bound], color=line.get_color())
    for bound in dict.fromkeys(p.bound for p in projections):
        axes.plot([], [], marks[bound], color="grey", label=f"bound by {bound}")
    figure.legend(fontsize=7, loc="outside right upper")
    return figure


def _labelled(sweeps: Sequence[Sweep]) -> list[tuple[str, Curve]]:
    several = len(sweeps) > 1
    return [
        (f"{s.name}: " * several + f"{c.model} {c.mode}, {c.scaling}", c)
        for s in sweeps
        for c in s.curves
        if c.speeds
    ]


def _blank(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    _style(axes, x, y)
    return figure, axes


def _style(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _with_legend(figure: Figure, axes: Axes) -> Figure | None:
    """Return the figure with its legend, or None if nothing was drawn."""
    named = axes.get_legend_handles_labels()
    if not named[0]:
        return None
    if axes.get_xlabel() == "processes":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*named, fontsize=7, loc="outside upper left")
    return figure
