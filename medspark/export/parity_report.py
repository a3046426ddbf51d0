"""The parity report: the torch network and its exports side by side, as Markdown and HTML."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from medspark.eps import eps_text
from medspark.evaluate.names import in_markdown, wrapped
from medspark.evaluate.result import CLEAN, WORST, RobustnessResult
from medspark.evaluate.sanity import HOLLOW_MEANS, SIGN
from medspark.evaluate.tables import STYLE, html_table, piped_table
from medspark.export.deployed import STRAIGHT_THROUGH
from medspark.export.result import Artifact, ExportResult, Latency

__all__ = ["latency_figure", "summary_lines", "table", "write_parity_report"]

_ATTACKS = ("transfer", STRAIGHT_THROUGH, "square")
_FIGURES = ("clean", "AUROC", "worst case")


def write_parity_report(
    folder: Path,
    result: ExportResult,
    *,
    facts: Mapping[str, str],
    earlier: Sequence[ExportResult] = (),
) -> None:
    """Write report.md, report.html and latency.png to ``folder``.

    The figure also shows ``earlier`` exports, of other networks on the same data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    latency_figure([*earlier, result]).savefig(buffer, format="png", dpi=110)
    (folder / "latency.png").write_bytes(buffer.getvalue())
    (folder / "report.md").write_text(markdown(result, facts=facts), encoding="utf-8")
    page = _page(result, facts=facts, picture=buffer.getvalue())
    (folder / "report.html").write_text(page, encoding="utf-8")


def table(result: ExportResult) -> list[list[str]]:
    """Return the table as rows of text; the first row is the heading."""
    eps = max((figures.eps for figures in result.twin.worst_case), default=0.0)
    attacks = [f"{name.replace('_', ' ')}, {eps_text(eps)}" for name in _ATTACKS]
    head = [
        "model", "numbers", "MB", "ms, 1 thread", "ms, 2 threads", "peak MB",
        "largest difference", "same answers", "clean", "AUROC", *attacks,
        f"worst case, {eps_text(eps)}",
    ]  # fmt: skip
    twin = [
        f"{result.architecture}, torch", "float32", "", _latency(result.twin_latency_ms), "", "",
        "", "", *_robustness(result.twin, eps),
    ]  # fmt: skip
    return [head, twin, *(_row(each, eps) for each in result.artifacts)]


def markdown(result: ExportResult, *, facts: Mapping[str, str]) -> str:
    """Return the report as Markdown."""
    lines = [f"# Exports of {in_markdown(Path(result.model).name)}", ""]
    lines += [f"- {in_markdown(sentence)}" for sentence in _verdict(result)]
    lines += ["", *piped_table(table(result)), "", "![latency](latency.png)", ""]
    lines += [f"- {name}: {in_markdown(value)}" for name, value in facts.items()]
    for each in result.artifacts:
        if len(each.tried) > 1 or each.layers:
            lines += ["", f"## How {each.backend} {each.precision} was chosen", ""]
            lines += [f"- {in_markdown(tried)}" for tried in _chosen(each)]
    return "\n".join(lines) + "\n"


def summary_lines(result: ExportResult) -> list[str]:
    """Return the table and the verdict as lines for a terminal."""
    rows = [
        [
            f"{each.backend} {each.precision}",
            f"{each.bytes / 1e6:.1f} MB",
            _latency(each.latency_ms),
        ]
        + [f"{name} {value}" for name, value in zip(_FIGURES, _short(each), strict=True)]
        for each in result.artifacts
    ]
    twin = ["torch", "", _latency(result.twin_latency_ms)]
    twin += [f"{name} {value}" for name, value in zip(_FIGURES, _short(result.twin), strict=True)]
    return ["  ".join(row) for row in [twin, *rows]] + _verdict(result)


def _short(model: RobustnessResult) -> list[str]:
    eps = max((figures.eps for figures in model.worst_case), default=0.0)
    clean, auroc, *_, worst = _robustness(model, eps)
    return [clean, auroc, worst]


def latency_figure(results: Sequence[ExportResult]) -> Figure:
    """Draw worst-case accuracy over the latency of one image, for every network and precision."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    flagged = False
    for number, result in enumerate(results):
        points: list[tuple[str, RobustnessResult, float]] = [
            ("torch", result.twin, result.twin_latency_ms.median)
        ]
        points += [(f"{a.backend} {a.precision}", a, a.latency_ms.median) for a in result.artifacts]
        eps = max((figures.eps for figures in result.twin.worst_case), default=0.0)
        for marker, (name, model, median) in zip("os^Dv", points, strict=False):
            held = model.value(WORST, "accuracy", eps=eps)
            flagged |= not model.believable
            axes.plot(
                [median], [held if held is not None else float("nan")], marker, ms=7,
                color=f"C{number % 10}", mfc=None if model.believable else "white",
                label=wrapped(f"{result.architecture}, {name}", width=40, lines=1),
            )  # fmt: skip
    axes.set(xscale="log", xlabel="ms for one image, one thread", ylabel="worst-case accuracy")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    if flagged:
        figure.supxlabel(HOLLOW_MEANS, fontsize=8)
    return figure


def _row(each: Artifact, eps: float) -> list[str]:
    sign = "" if each.believable else f"{SIGN} "
    return [
        f"{sign}{each.backend} {each.precision}",
        each.numbers,
        f"{each.bytes / 1e6:.1f}",
        _latency(each.latency_ms),
        _latency(each.latency_ms_2_threads),
        f"{each.peak_bytes / 1e6:.0f}",
        f"{each.parity.largest_difference:.2g}",
        f"{each.parity.same_answers:.1%}",
        *_robustness(each, eps),
    ]


def _robustness(model: RobustnessResult, eps: float) -> list[str]:
    clean = [model.value(CLEAN, metric) for metric in ("accuracy", "auroc")]
    attacked = [model.value(name, "accuracy", eps=eps) for name in (*_ATTACKS, WORST)]
    return ["–" if value is None else f"{value:.3f}" for value in (*clean, *attacked)]


def _latency(found: Latency) -> str:
    return f"{found.median:.2f} (p99 {found.p99:.2f})"


def _verdict(result: ExportResult) -> list[str]:
    """Return one sentence for each flag, or one that there is none."""
    judged: list[tuple[str, RobustnessResult]] = [("torch", result.twin)]
    judged += [(f"{each.backend} {each.precision}", each) for each in result.artifacts]
    flagged = [
        f"{SIGN} {name}: {flag.sentence}." for name, each in judged for flag in each.triggered_flags
    ]
    return flagged or ["All checks of the network and of all exports passed."]


def _chosen(each: Artifact) -> list[str]:
    worst = [f"{name}: {error:.1%} of the logits' spread" for name, error in each.layers.items()]
    return [*each.tried, f"chosen: {each.numbers}", *worst[:10]]


def _page(result: ExportResult, *, facts: Mapping[str, str], picture: bytes) -> str:
    title = html.escape(f"Exports of {Path(result.model).name}")
    verdict = _verdict(result)
    believable = all(each.believable for each in (result.twin, *result.artifacts))
    mark = "fine" if believable else "flagged"
    chosen = "".join(
        f"<h2>How {each.backend} {each.precision} was chosen</h2>{_listed(_chosen(each))}"
        for each in result.artifacts
        if len(each.tried) > 1 or each.layers
    )
    settings = html_table([["setting", "value"], *([k, v] for k, v in facts.items())])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style><h1>{title}</h1>"
        f'<div class="{mark}">{_listed(verdict)}</div>{html_table(table(result))}'
        f'<img alt="latency" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        f"{chosen}{settings}</html>\n"
    )


def _listed(sentences: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(each)}</li>' for each in sentences)}</ul>"
