"""The robustness report for people, as Markdown and as one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from medspark.eps import eps_text
from medspark.evaluate.bootstrap import Interval
from medspark.evaluate.gallery import Exhibit
from medspark.evaluate.names import in_markdown
from medspark.evaluate.operating_point import (
    OperatingPoint,
    decision_lines,
    decision_sentence,
    rate_lines,
)
from medspark.evaluate.plots import (
    accuracy_curves,
    decision_curve,
    image_grid,
    reliability_diagram,
    roc_curves,
)
from medspark.evaluate.result import AttackFigures, ConditionFigures, RobustnessResult
from medspark.evaluate.sanity import CONTROL_EVERY, SIGN, Flag
from medspark.evaluate.summary import Predictions
from medspark.evaluate.tables import STYLE, html_table, piped_table


def write_report(
    folder: Path,
    result: RobustnessResult,
    predictions: Predictions,
    *,
    title: str,
    facts: Mapping[str, str],
    classes: Sequence[str],
    positive: int | None,
    point: OperatingPoint | None = None,
    shown: Sequence[Exhibit] = (),
    shown_eps: float = 0.0,
) -> None:
    """Write report.md, report.html and the figures as PNG to ``folder``.

    ``point`` says where a model of two classes decides; then probabilities are drawn calibrated,
    and there is a decision curve.
    """
    folder.mkdir(parents=True, exist_ok=True)
    calibrated = predictions if point is None else point.calibrated(predictions)
    facts = {**facts, **carried_facts(result)}
    figures = {
        "accuracy": accuracy_curves(result),
        "reliability": reliability_diagram(result, calibrated),
        "roc": roc_curves(result, predictions, classes=classes, positive=positive),
    }
    if point is not None:
        figures["decision"] = decision_curve(result, calibrated, point)
    if shown:
        figures["images"] = image_grid(shown, classes=classes, eps=shown_eps)
    pictures = {name: _png(figure) for name, figure in figures.items()}
    for name, picture in pictures.items():
        (folder / f"{name}.png").write_bytes(picture)
    (folder / "report.md").write_text(
        markdown(result, title=title, facts=facts, pictures=list(pictures)), encoding="utf-8"
    )
    page = _page(result, title=title, facts=facts, pictures=pictures)
    (folder / "report.html").write_text(page, encoding="utf-8")


def verdict(result: RobustnessResult) -> list[str]:
    """Return the verdict of the sanity checks, then one sentence for each flag."""
    flagged = result.triggered_flags
    if not flagged:
        return [f"All {len(result.flags)} sanity checks passed."]
    return [
        f"{SIGN} Do not trust these figures. Sanity checks flagged them:",
        *(_reason(flag) for flag in flagged),
    ]


def table(result: RobustnessResult) -> list[list[str]]:
    """Return the metrics as rows of text; the first row is the heading."""
    names = [name.replace("_", " ") for name in result.clean.metrics]
    clean = ["clean", "0", *_figures(result.clean), ""]
    rows = [clean, *(_row(attack) for attack in result.under_attack)]
    head = ["attack", "eps", *names, "success"]
    if result.clean.psnr is not None:
        head += ["PSNR denoised", "SSIM denoised"]
        for row, of in zip(rows, (result.clean, *result.under_attack), strict=True):
            row += [_text(of.psnr), _text(of.ssim)]
    return [head, *_signed(rows, result)]


def class_table(result: RobustnessResult) -> list[list[str]]:
    """Return the metrics of every class as rows of text; the first row is the heading."""
    names = ("sensitivity", "specificity", "auroc")
    attacked = [(_row(attack)[:2], attack.classes) for attack in result.under_attack]
    rows = [
        [*condition, figures.name]
        + [_text(getattr(figures, name), figures.intervals.get(name)) for name in names]
        for condition, classes in [(["clean", "0"], result.clean.classes), *attacked]
        for figures in classes
    ]
    return [["attack", "eps", "class", *names], *_signed(rows, result)]


def _signed(rows: Sequence[list[str]], result: RobustnessResult) -> list[list[str]]:
    """Return ``rows`` with the warning sign before the attack's name if a flag concerns the row."""
    flagged = result.triggered_flags
    clean = any(flag.of_clean_answers for flag in flagged)
    return [
        [f"{SIGN} {attack}", *figures]
        if (clean if attack == "clean" else flagged)
        else [attack, *figures]
        for attack, *figures in rows
    ]


def markdown(
    result: RobustnessResult, *, title: str, facts: Mapping[str, str], pictures: Sequence[str] = ()
) -> str:
    """Return the report as Markdown."""
    first, *flagged = verdict(result)
    lines = [
        f"# {in_markdown(title)}",
        "",
        f"**{first}**",
        "",
        *(f"- {reason}" for reason in flagged),
        "",
    ]
    lines += [*piped_table(table(result)), ""]
    if result.decision is not None:
        lines += ["## Operating point", "", *decision_lines(result), ""]
    if result.clean.classes:
        named = [[*row[:2], in_markdown(row[2]), *row[3:]] for row in class_table(result)]
        lines += ["## Classes", "", *piped_table(named), ""]
    lines += [f"- {name}: {in_markdown(value)}" for name, value in facts.items()]
    lines += ["", "## Sanity checks", "", *(_check(flag) for flag in result.flags), ""]
    lines += [f"![{name}]({name}.png)" for name in pictures]
    return "\n".join(lines) + "\n"


def _page(
    result: RobustnessResult,
    *,
    title: str,
    facts: Mapping[str, str],
    pictures: Mapping[str, bytes],
) -> str:
    first, *flagged = verdict(result)
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in flagged)
    classes = f"<h2>Classes</h2>{html_table(class_table(result))}" if result.clean.classes else ""
    checks = "".join(f"<li>{html.escape(_check(flag)[2:])}</li>" for flag in result.flags)
    images = "".join(
        f'<h2>{name}</h2><img alt="{name}" '
        f'src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        for name, picture in pictures.items()
    )
    settings = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>"
        f'<div class="{"flagged" if flagged else "fine"}">{html.escape(first)}'
        f"<ul>{reasons}</ul></div>"
        f"{html_table(table(result))}{_decided(result)}{images}{classes}"
        f"<h2>Sanity checks</h2><ul>{checks}</ul><table>{settings}</table></html>\n"
    )


def _decided(result: RobustnessResult) -> str:
    if result.decision is None:
        return ""
    rates = "".join(f"<li>{html.escape(line[2:])}</li>" for line in rate_lines(result))
    sentence = html.escape(decision_sentence(result.decision))
    return f"<h2>Operating point</h2><p>{sentence}</p><ul>{rates}</ul>"


def carried_facts(result: RobustnessResult) -> dict[str, str]:
    """Return the fact which images were not attacked at every eps, if there are any."""
    rows = [row for row in result.attacks if row.carried]
    if not rows:
        return {}
    counts = "; ".join(f"{row.name} {eps_text(row.eps)}: {row.carried} images" for row in rows)
    return {
        "not attacked again": f"{counts}. They held at a larger eps, and what that attack had "
        f"found, made smaller, stands for them; one image in {CONTROL_EVERY} is attacked at every "
        "eps"
    }


def _row(attack: AttackFigures) -> list[str]:
    success = _text(attack.success_rate, attack.intervals.get("success_rate"))
    name = attack.name.replace("_", " ") + (f"-{attack.steps}" if attack.name == "pgd" else "")
    return [name, eps_text(attack.eps), *_figures(attack), success]


def _figures(figures: ConditionFigures) -> list[str]:
    return [_text(value, figures.intervals.get(name)) for name, value in figures.metrics.items()]


def _text(value: float | None, interval: Interval | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _check(flag: Flag) -> str:
    state = "TRIGGERED" if flag.triggered else "passed"
    return (
        f"- {flag.name}: {state} ({flag.value:.4g}, threshold {flag.threshold:g}): {flag.sentence}."
    )


def _reason(flag: Flag) -> str:
    return f"{flag.name.replace('_', ' ')}: {flag.sentence}."


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
