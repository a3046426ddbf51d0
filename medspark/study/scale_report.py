"""Write the report of a sweep: a table, figures, and one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import io
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from medspark.evaluate.sanity import SIGN, SIGN_MEANS
from medspark.study.laws import Fit, Projection
from medspark.study.scale_plots import figures_of
from medspark.study.sweep import Curve, Prediction, ScaleCell, Sweep

__all__ = ["compare_sweeps", "summary_note", "table", "write_sweep"]

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
    """Write sweep.json, table.md, the figures as PNG and report.html; return the HTML's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(sweep.model_dump_json(indent=1), encoding="utf-8")
    (folder / "table.md").write_text(table(sweep) + "\n", encoding="utf-8")
    pictures = _pictures(folder, figures_of([sweep]))
    page = folder / "report.html"
    page.write_text(_page(f"Sweep {sweep.name}", _body(sweep, pictures)), encoding="utf-8")
    return page


def compare_sweeps(folder: Path, sweeps: Sequence[Sweep]) -> Path:
    """Write compare.html, which compares ``sweeps``, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(folder, figures_of(sweeps))
    parts = [_html_table(_summaries(sweeps)), *(_image(n, p) for n, p in pictures.items())]
    for sweep in sweeps:
        parts += [f"<h2>{html.escape(sweep.name)}</h2>", _html_table(_rows(sweep))]
        parts += [_flag_sentences(sweep), _seen(sweep)]
    page = folder / "compare.html"
    title = "Sweeps compared: " + ", ".join(sweep.name for sweep in sweeps)
    page.write_text(_page(title, "".join(parts)), encoding="utf-8")
    return page


def table(sweep: Sweep) -> str:
    """Return the medians over the repeats as a Markdown table, one row for each point.

    A row is marked ⚠ if one of its networks is flagged; the flags are listed below the table.
    """
    head, *rows = _rows(sweep)
    rule = ["---", "---", *["---:"] * (len(head) - 2)]
    lines = ["| " + " | ".join(row) + " |" for row in [head, rule, *rows]]
    return "\n".join([*lines, *(text for note in _flag_notes(sweep) for text in ("", note))])


def summary_note(sweep: Sweep, *, charts: str = "") -> str:
    """Return the note at the top of the sweep's MLflow run, as Markdown.

    ``charts`` is the address of the page that compares the cells.
    """
    lines = [*(f"- {sentence}" for sentence in sweep.sentences), "", table(sweep)]
    if charts:
        lines = [f"[All cells in charts, side by side]({charts})", "", *lines]
    return "\n".join([*lines, "", f"`{sweep.command}`", "", "Whole report: report.html below."])


def _body(sweep: Sweep, pictures: Mapping[str, bytes]) -> str:
    failed = [m for m in sweep.cells if m.status == "failed"]
    failures = "".join(f"<li>{html.escape(f'{m.point}: {m.failure}')}</li>" for m in failed)
    measured = [name for name in pictures if not name.startswith("projection")]
    projected = [name for name in pictures if name.startswith("projection")]
    return "".join(
        [
            _seen(sweep),
            f'<div class="failed">Cells that failed:<ul>{failures}</ul></div>' if failed else "",
            "<h2>What was measured</h2>",
            "<p>Medians over the repeats, after the warm-up; * marks points with more threads than "
            "cores. A share of the data keeps the number of epochs, so it has fewer steps.</p>",
            _html_table(_rows(sweep)),
            _flag_sentences(sweep),
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
    point = group[0].point
    crowded = "*" if group[0].oversubscribed else ""
    sign = f"{SIGN} " if any(m.flagged for m in group) else ""
    name = {"plain": "no DDP", "slice": f"no DDP, batch {group[0].global_batch}"}.get(
        point.scaling, point.scaling
    )
    return [
        f"{sign}{point.model} {point.mode}",
        name,
        f"{point.data_share:g}",
        f"{statistics.fmean(m.train_images for m in group):.0f}",
        f"{point.world_size} × {point.threads_per_rank}{crowded}",
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


def _flag_notes(sweep: Sweep) -> list[str]:
    """Return the meaning of the sign in the table, and the number of networks per check."""
    counts = Counter(
        (f"{m.point.model} {m.point.mode}", flag.name) for m in sweep.finished for flag in m.flags
    )
    each = [
        f"{SIGN} {name}: {flag} in {n} cell{'s' * (n > 1)}"
        for (name, flag), n in sorted(counts.items())
    ]
    return [SIGN_MEANS, *each] if each else []


def _flag_sentences(sweep: Sweep) -> str:
    """Return a list of all flags, each with the figure behind it."""
    each = [f"{m.point}: {flag.sentence}." for m in sweep.finished for flag in m.flags]
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in each)
    return f"<h2>Flags</h2><p>{html.escape(SIGN_MEANS)}</p><ul>{items}</ul>" if each else ""


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
        return "There is no projection: it needs cells with one process and with two."
    c, p = sweep.cluster, sweep.probe
    return (
        "Assumed of the cluster: every node computes as one process here, "
        f"{c.bandwidth / 1e9:g} GB/s and {c.latency * 1e6:g} µs between nodes, "
        f"{c.storage / 1e9:g} GB/s of shared storage, half of the compute hides the all-reduce. "
        f"Measured here: start-up {c.startup_seconds:.0f} s, reading "
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


def _pictures(folder: Path, figures: Mapping[str, Figure]) -> dict[str, bytes]:
    pictures = {}
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        pictures[name] = buffer.getvalue()
        (folder / f"{name.replace(' ', '-')}.png").write_bytes(pictures[name])
    return pictures


def _seen(sweep: Sweep) -> str:
    text = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in sweep.sentences)
    return f'<div class="seen">{text}</div>' if text else ""


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
