"""The report of a sweep: a table, figures, and one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from medspark.study.laws import Fit, Projection, mean_interval
from medspark.study.sweep import Curve, Prediction, ScaleCell, Sweep

__all__ = ["compare_sweeps", "figures_of", "summary_note", "table", "write_sweep"]

Rows = list[list[str]]
# Network, mode, scaling, share of the data, processes.
_Point = tuple[str, str, str, float, int]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c1c1c }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums;
        font-size: 13px; display: block; overflow-x: auto }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
.seen { background: #eef4fb; border-left: 4px solid #2a6fb0; padding: .6rem 1rem }
.failed { background: #fdecea; border-left: 4px solid #c62828; padding: .6rem 1rem }
img { max-width: 100% }
pre { background: #f5f5f5; padding: .6rem; white-space: pre-wrap }
"""
_HEAD = [
    "network, mode", "scaling", "data", "images", "processes", "images/s", "efficiency",
    "data wait", "communication", "start-up s", "memory MB", "core-s / 10⁶ images", "AUROC",
    "worst case",
]  # fmt: skip


def write_sweep(folder: Path, sweep: Sweep) -> Path:
    """Write sweep.json, table.md, the figures as PNG and report.html; return the last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(sweep.model_dump_json(indent=1), encoding="utf-8")
    (folder / "table.md").write_text(table(sweep) + "\n", encoding="utf-8")
    pictures = _pictures(folder, figures_of([sweep]))
    page = folder / "report.html"
    page.write_text(_page(f"Sweep {sweep.name}", _body(sweep, pictures)), encoding="utf-8")
    return page


def compare_sweeps(folder: Path, sweeps: Sequence[Sweep]) -> Path:
    """Write compare.html, which sets ``sweeps`` side by side, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(folder, figures_of(sweeps))
    parts = [_html_table(_summaries(sweeps)), *(_image(n, p) for n, p in pictures.items())]
    for sweep in sweeps:
        parts += [f"<h2>{html.escape(sweep.name)}</h2>", _html_table(_rows(sweep))]
        parts += [_seen(sweep)]
    page = folder / "compare.html"
    title = "Sweeps compared: " + ", ".join(sweep.name for sweep in sweeps)
    page.write_text(_page(title, "".join(parts)), encoding="utf-8")
    return page


def table(sweep: Sweep) -> str:
    """Return the medians over the repeats as a Markdown table, one row for each point."""
    head, *rows = _rows(sweep)
    rule = ["---", "---", *["---:"] * (len(head) - 2)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def summary_note(sweep: Sweep, *, charts: str = "") -> str:
    """Return what the MLflow page shows on top of the sweep's own run, as Markdown.

    ``charts`` is the address of the page that compares its cells.
    """
    lines = [*(f"- {sentence}" for sentence in sweep.sentences), "", table(sweep)]
    if charts:
        lines = [f"[All cells in charts, side by side]({charts})", "", *lines]
    return "\n".join([*lines, "", f"`{sweep.command}`", "", "Whole report: report.html below."])


def figures_of(sweeps: Sequence[Sweep]) -> dict[str, Figure]:
    """Return the figures of one sweep, or of several in the same axes."""
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


def _body(sweep: Sweep, pictures: Mapping[str, bytes]) -> str:
    failed = [m for m in sweep.cells if m.status == "failed"]
    said = "".join(
        f"<li>{html.escape(f'{m.point}: {m.error.splitlines()[0]}')}</li>" for m in failed
    )
    measured = [name for name in pictures if not name.startswith("projection")]
    projected = [name for name in pictures if name.startswith("projection")]
    return "".join(
        [
            _seen(sweep),
            f'<div class="failed">Cells that failed:<ul>{said}</ul></div>' if failed else "",
            "<h2>What was measured</h2>",
            "<p>Medians over the repeats, after the warm-up; * marks points with more threads than "
            "cores. A share of the data keeps the number of epochs, so it has fewer steps.</p>",
            _html_table(_rows(sweep)),
            *(_image(name, pictures[name]) for name in measured),
            "<h2>Fitted laws</h2>",
            _html_table(_laws(sweep.curves)),
            "<h2>Foreseen and measured</h2>",
            _html_table(_foreseen(sweep.predictions)),
            "<h2>Projection</h2>",
            f"<p>{html.escape(_assumptions(sweep))}</p>",
            *(_image(name, pictures[name]) for name in projected),
            *(
                f"<h3>{html.escape(name)}</h3>" + _html_table(_projected(projections))
                for name, projections in sweep.projections.items()
            ),
            "<h2>How</h2>",
            f"<pre>{html.escape(sweep.command)}</pre>",
            f"<p>{html.escape(sweep.hardware)}. Data: {html.escape(sweep.dataset)}, digest "
            f"{sweep.dataset_digest[:12]}.</p>",
        ]
    )


def _points(sweep: Sweep) -> dict[_Point, list[ScaleCell]]:
    groups: dict[_Point, list[ScaleCell]] = {}
    for m in sweep.finished:
        c = m.point
        key = (c.model, c.mode, c.scaling, c.data_share, c.world_size)
        groups.setdefault(key, []).append(m)
    return dict(sorted(groups.items()))


def _rows(sweep: Sweep) -> Rows:
    return [_HEAD, *(_row(group) for group in _points(sweep).values())]


def _row(group: Sequence[ScaleCell]) -> list[str]:
    cell = group[0].point
    crowded = "*" if group[0].oversubscribed else ""
    name = {"plain": "no DDP", "slice": f"no DDP, batch {group[0].global_batch}"}.get(
        cell.scaling, cell.scaling
    )
    return [
        f"{cell.model} {cell.mode}",
        name,
        f"{cell.data_share:g}",
        f"{statistics.fmean(m.train_images for m in group):.0f}",
        f"{cell.world_size} × {cell.threads_per_rank}{crowded}",
        _spread([m.images_per_second for m in group], "{:.1f}"),
        _middle([m.efficiency for m in group], "{:.2f}"),
        _middle([m.data_wait_share for m in group], "{:.1%}"),
        _middle([m.communication_share for m in group], "{:.1%}"),
        _middle([m.startup.get("total") for m in group], "{:.1f}"),
        _middle([m.peak_memory_mb for m in group], "{:.0f}"),
        _middle([m.core_seconds_per_million_images for m in group], "{:.0f}"),
        _spread([m.clean_auroc for m in group], "{:.3f}"),
        _spread([m.worst_case_accuracy for m in group], "{:.3f}"),
    ]


def _middle(values: Iterable[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(statistics.median(known)) if known else "–"


def _spread(values: Iterable[float | None], form: str) -> str:
    known = sorted(value for value in values if value is not None)
    if len(known) < 2:
        return _middle(known, form)
    low, high = form.format(known[0]), form.format(known[-1])
    return f"{_middle(known, form)} [{low}, {high}]"


def _summaries(sweeps: Sequence[Sweep]) -> Rows:
    rows = [["sweep", "data", "hardware", "cells", "failed", "what was seen"]]
    for sweep in sweeps:
        failed = len(sweep.cells) - len(sweep.finished)
        seen = " ".join(sweep.sentences)
        place = f"{Path(sweep.dataset).name} {sweep.dataset_digest[:8]}"
        rows.append([sweep.name, place, sweep.hardware, str(len(sweep.cells)), str(failed), seen])
    return rows


def _laws(drawn: Sequence[Curve]) -> Rows:
    rows = [["network, mode, scaling", "law", "images/s of one", "serial", "coherency", "residual"]]
    for curve in drawn:
        name = f"{curve.model} {curve.mode}, {curve.scaling}"
        for law, fit, needed in (("Amdahl", curve.amdahl, 2), ("USL", curve.usl, 3)):
            if fit is None:
                rows.append([name, law, f"needs {needed} process counts within the cores", *"–––"])
            else:
                terms = [_term(fit, t) for t in ("base", "contention", "coherency")]
                rows.append([name, law, *terms, f"{fit.largest_residual:.1%}"])
    return rows


def _term(fit: Fit, name: str) -> str:
    if name not in fit.intervals:
        return "–"
    low, high = fit.intervals[name]
    return f"{getattr(fit, name):.3g} [{low:.3g}, {high:.3g}]"


def _foreseen(predictions: Sequence[Prediction]) -> Rows:
    rows = [["point", "foreseen from", "foreseen images/s", "measured", "error"]]
    for p in predictions:
        point = f"{p.model} {p.mode}, {p.scaling}, {p.world_size} processes"
        rows.append([point, p.how, f"{p.predicted:.1f}", f"{p.measured:.1f}", f"{p.error:+.0%}"])
    return rows


def _assumptions(sweep: Sweep) -> str:
    if sweep.probe is None:
        return "There is none: it needs two processes and one."
    c, p = sweep.cluster, sweep.probe
    return (
        "Assumed of the cluster: every node computes as one process here, "
        f"{c.bandwidth / 1e9:g} GB/s and {c.latency * 1e6:g} µs between nodes, "
        f"{c.storage / 1e9:g} GB/s of shared storage, half of the compute hides the all-reduce. "
        f"ScaleCell here: start-up {c.startup_seconds:.0f} s, reading "
        f"{p.loader_images_per_second:.0f} images/s, and between processes of this machine "
        f"{p.bandwidth / 1e9:.2f} GB/s and {p.latency * 1e6:.0f} µs."
    )


def _projected(projections: Sequence[Projection]) -> Rows:
    rows = [
        ["images", "nodes", "batch/node", "images/s", "efficiency", "hours", "cost", "bound by",
         "what to change"]
    ]  # fmt: skip
    for p in projections:
        rows.append(
            [f"{p.images:.0e}", str(p.nodes), str(p.batch), f"{p.images_per_second:.3g}",
             f"{p.efficiency:.2f}", f"{p.hours:.3g}", f"{p.cost:.3g}", p.bound, p.advice]
        )  # fmt: skip
    return rows


def _throughput(sweeps: Sequence[Sweep]) -> Figure | None:
    figure, axes = _blank("processes", "images/s")
    for label, curve in _labelled(sweeps):
        counts = list(curve.speeds)
        middle = [statistics.median(curve.speeds[n]) for n in counts]
        (line,) = axes.plot(counts, middle, marker="o", ms=4, label=label)
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
        axes.plot(list(found), list(found.values()), marker="o", ms=4, label=label)
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
        # Shares are of whole patients, so that repeats differ by a few images.
        sizes = {m.point.data_share: m.train_images for sweep in sweeps for m in sweep.finished}
        axes.set_xticks(list(sizes.values()), [f"{size:,}" for size in sizes.values()])
        axes.set_xticks([], minor=True)
        for sweep in sweeps:
            _draw_series(axes, sweep, name, several=len(sweeps) > 1)
    return _with_legend(figure, left)


def _draw_series(axes: Axes, sweep: Sweep, name: str, *, several: bool) -> None:
    series: dict[str, dict[float, list[float]]] = {}
    for m in sweep.finished:
        value = getattr(m, name)
        if value is not None:
            by_images = series.setdefault(f"{m.point.model} {m.point.mode}", {})
            by_images.setdefault(m.point.data_share, []).append(value)
    images = {m.point.data_share: m.train_images for m in sweep.finished}
    for label, by_share in series.items():
        shares = sorted(by_share)
        means = [mean_interval(by_share[s])[0] for s in shares]
        errors = [np.std(by_share[s]) for s in shares]
        axes.errorbar(
            [images[s] for s in shares], means, yerr=errors, marker="o", ms=4, capsize=3,
            label=f"{sweep.name}: {label}" if several else label,
        )  # fmt: skip


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
    axes.legend(fontsize=7)
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
    """Return the figure with its legend, None where nothing was drawn."""
    if not axes.get_legend_handles_labels()[0]:
        return None
    if axes.get_xlabel() == "processes":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=7)
    return figure


def _pictures(folder: Path, figures: Mapping[str, Figure]) -> dict[str, bytes]:
    pictures = {}
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        pictures[name] = buffer.getvalue()
        (folder / f"{name.replace(' ', '-')}.png").write_bytes(pictures[name])
    return pictures


def _seen(sweep: Sweep) -> str:
    said = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in sweep.sentences)
    return f'<div class="seen">{said}</div>' if said else ""


def _image(name: str, picture: bytes) -> str:
    data = base64.b64encode(picture).decode()
    return f'<h3>{html.escape(name)}</h3><img alt="{name}" src="data:image/png;base64,{data}">'


def _html_table(rows: Rows) -> str:
    head, *others = rows
    lines = [_cells(head, "th"), *(_cells(row, "td") for row in others)]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _cells(cells: Sequence[str], tag: str) -> str:
    return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)


def _page(title: str, body: str) -> str:
    name = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>'
        f"<style>{_STYLE}</style><h1>{name}</h1>{body}</html>\n"
    )
