"""The report of a detection, as Markdown and HTML: no oblivious figure without the adaptive one."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from medspark.defend.detect.result import (
    AdaptiveFigures,
    DetectorFigures,
    DetectResult,
    RateFigures,
)
from medspark.eps import eps_text
from medspark.evaluate.names import in_markdown
from medspark.evaluate.sanity import SIGN, Flag
from medspark.evaluate.tables import STYLE, html_table, piped_table

__all__ = ["matrix", "metrics", "rate_text", "sentences", "table", "write_detection_report"]

Table = list[list[str]]


def write_detection_report(folder: Path, result: DetectResult, *, facts: Mapping[str, str]) -> None:
    """Write report.md and report.html to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(_markdown(result, facts), encoding="utf-8")
    (folder / "report.html").write_text(_page(result, facts), encoding="utf-8")


def table(detectors: Sequence[DetectorFigures], triggered: Sequence[Flag]) -> Table:
    """Return the figures of the attacked detectors as rows of text; the first row is the heading.

    Where a detector was not attacked, bounds stand for adaptive figures: it is no better than that.
    """
    head = [
        "detector", "layer", "attack", "eps", "AUROC", "TPR at 1 %", "TPR at 5 %",
        "wrong and undetected", "adaptive AUROC", "adaptive TPR at 1 %", "adaptive TPR at 5 %",
        "adaptive wrong and undetected", "adaptive accuracy with guard",
    ]  # fmt: skip
    signed = {flag.name.rpartition(": ")[0] for flag in triggered}
    return [
        head,
        *(
            _row(each, flagged=bool({"", f"{each.name}:{each.layer}"} & signed))
            for each in detectors
            if _own(each)
        ),
    ]


def matrix(result: DetectResult) -> Table:
    """Return AUROC by layer and detector, oblivious / adaptive; the first row is the heading.

    Oblivious is the mean over the attacks at the largest eps. ≤ marks figures of detectors that
    were not attacked themselves.
    """
    eps = max(each.eps for each in result.detectors)
    at_largest = [each for each in result.detectors if each.eps == eps]
    names = list(dict.fromkeys(each.name for each in at_largest))
    layers = list(dict.fromkeys(each.layer for each in at_largest))
    cells = {(each.name, each.layer): each for each in at_largest}

    def cell(name: str, layer: str) -> str:
        if (name, layer) not in cells:
            return ""
        own = [each.auroc for each in at_largest if (each.name, each.layer) == (name, layer)]
        areas = [area for area in own if area is not None]
        mean = sum(areas) / len(areas) if areas else None
        bound, worst = _adaptive(cells[name, layer])
        return f"{_text(mean)} / {bound}{_text(worst.auroc if worst else None)}"

    return [["layer", *names], *([layer, *(cell(name, layer) for name in names)]
                                 for layer in layers)]  # fmt: skip


def rates(result: DetectResult) -> Table:
    """Return the false-positive rates that were reached on clean test images."""
    found = result.false_positives
    groups = {"all": found} | {f"class {n}": r for n, r in found.classes.items()}
    groups |= {f"site {n}": r for n, r in found.sites.items()}
    rows = [[name, str(each.images), rate_text(each)] for name, each in groups.items()]
    return [["images", "number", "false positives"], *rows]


def defences(result: DetectResult) -> Table:
    """Return how often the answers of rank_pca's defence are right on attacked images."""
    return [
        ["components", "attack", "eps", "images", "class before the last change", "second class"],
        *(
            [d.layer, d.attack, eps_text(d.eps), str(d.images), _text(d.previous_class),
             _text(d.second_class)]
            for d in result.rank_defence
        ),
    ]  # fmt: skip


def unseen(result: DetectResult) -> Table:
    """Return AUROC under attacks that were left out of the fit; oblivious, to compare fits only."""
    return [
        ["detector", "layer", "left out", "AUROC", "AUROC if learnt"],
        *(
            [g.name, g.layer, g.left_out, _text(g.auroc), _text(g.auroc_if_learnt)]
            for g in result.generalisation
        ),
    ]


def sentences(result: DetectResult) -> list[str]:
    """Return what the figures mean: the guard, its rate, reservations, and triggered flags."""
    chosen, found = result.chosen, result.false_positives
    lines = [
        f"The guard is {chosen.name} on {chosen.layer} (the best single feature is "
        f"{chosen.best_single}): it flags {rate_text(found)} of the clean test "
        f"images (asked: {found.asked:.1%}). With it, {result.accuracy_with_guard:.1%} of them are "
        f"right and not flagged; without it, {result.accuracy:.1%} are right."
    ]
    for eps, share in result.undetected_without_guard.items():
        worst = [_adaptive(each)[1] for each in result.detectors
                 if (each.name, each.layer) == (chosen.name, chosen.layer)
                 and eps_text(each.eps) == eps]  # fmt: skip
        if worst and worst[0]:
            lines.append(
                f"At eps {eps}, attacks leave {worst[0].undetected_and_wrong:.1%} of the images "
                f"wrong and undetected; without a guard {share:.1%} are wrong."
            )
    if result.rank_defence and len(found.classes) == 2:
        lines.append(
            "With two classes, the defence of rank_pca always answers with the other class."
        )
    for each in result.detectors:
        if _own(each) and not isinstance(each.adaptive, AdaptiveFigures):
            lines.append(f"{each.name} on {each.layer} was not attacked: {each.adaptive.reason}.")
    lines = list(dict.fromkeys(lines))
    return lines + [f"{SIGN} Do not trust these figures: {f.sentence}."
                    for f in result.triggered_flags]  # fmt: skip


def metrics(result: DetectResult) -> dict[str, float]:
    """Return the figures by their MLflow names."""
    found = {
        "false_positive_rate": result.false_positives.rate,
        "clean/accuracy": result.accuracy,
        "clean/accuracy_with_guard": result.accuracy_with_guard,
        "flags_triggered": float(len(result.triggered_flags)),
    }
    for each in filter(_own, result.detectors):
        eps = eps_text(each.eps).replace("/", "_")
        place = f"{each.name}/{each.layer}/{each.attack}/eps_{eps}"
        _, worst = _adaptive(each)
        for prefix, figures in ((place, each), (f"{place}/adaptive", worst)):
            if figures is not None:
                found[f"{prefix}/auroc"] = figures.auroc
                found[f"{prefix}/undetected_and_wrong"] = figures.undetected_and_wrong
    return {name: float(value) for name, value in found.items() if value is not None}


def _own(each: DetectorFigures) -> bool:
    """Return whether attacks aimed at the detector on this layer."""
    return (worst := _adaptive(each)[1]) is not None and worst.direct


def _adaptive(each: DetectorFigures) -> tuple[str, AdaptiveFigures | None]:
    """Return the adaptive figures, and ≤ before those that are only a bound."""
    if isinstance(each.adaptive, AdaptiveFigures):
        return "", each.adaptive
    return "≤ ", each.adaptive.upper_bound


def _row(each: DetectorFigures, *, flagged: bool) -> list[str]:
    bound, worst = _adaptive(each)
    own = [each.auroc, each.tpr_at_fpr.get("0.01"), each.tpr_at_fpr.get("0.05"),
           each.undetected_and_wrong]  # fmt: skip
    adaptive = [f"{bound}–"] * 5
    if worst is not None:
        above = "≥ " if bound else ""
        caught = [worst.auroc, worst.tpr_at_fpr.get("0.01"), worst.tpr_at_fpr.get("0.05")]
        adaptive = [*(bound + _text(value) for value in caught),
                    above + _text(worst.undetected_and_wrong),
                    bound + _text(worst.accuracy_with_guard)]  # fmt: skip
    head = [f"{SIGN} {each.name}" if flagged else each.name, each.layer, each.attack,
            eps_text(each.eps)]  # fmt: skip
    return [*head, *map(_text, own), *adaptive]


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def rate_text(found: RateFigures) -> str:
    """Return a share in per cent, with its interval."""
    if found.rate is None:
        return "–"
    return f"{found.rate:.1%} [{found.interval[0]:.1%}, {found.interval[1]:.1%}]"


def _tables(result: DetectResult) -> dict[str, Table]:
    named = {
        "Detectors, oblivious and adaptive": table(result.detectors, result.triggered_flags),
        "AUROC by layer, oblivious / adaptive": matrix(result),
        "False positives": rates(result),
    }
    if result.rank_defence:
        named["Defence of rank_pca"] = defences(result)
    if result.generalisation:
        named["Attacks that were left out of the fit, oblivious"] = unseen(result)
    return named


def _markdown(result: DetectResult, facts: Mapping[str, str]) -> str:
    lines = [f"# Guard of {in_markdown(Path(result.model).name)}", ""]
    lines += [f"- {in_markdown(sentence)}" for sentence in sentences(result)]
    for title, rows in _tables(result).items():
        escaped = [[in_markdown(cell) for cell in row] for row in rows]
        lines += ["", f"## {title}", "", *piped_table(escaped)]
    lines += ["", "## Settings", ""]
    lines += [f"- {name}: {in_markdown(value)}" for name, value in facts.items()]
    lines += ["", "## Sanity checks", ""]
    lines += [f"- {in_markdown(f.name)}: {_state(f.triggered)}, {in_markdown(f.sentence)}."
              for f in result.flags]  # fmt: skip
    return "\n".join(lines) + "\n"


def _page(result: DetectResult, facts: Mapping[str, str]) -> str:
    first, *others = (html.escape(sentence) for sentence in sentences(result))
    flagged = "flagged" if result.triggered_flags else "fine"
    tables = "".join(
        f"<h2>{html.escape(title)}</h2>{html_table(rows)}"
        for title, rows in _tables(result).items()
    )
    settings = html_table([["setting", ""], *([name, value] for name, value in facts.items())])
    checks = "".join(
        f"<li>{html.escape(f'{f.name}: {_state(f.triggered)}, {f.sentence}.')}</li>"
        for f in result.flags
    )
    title = html.escape(f"Guard of {Path(result.model).name}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<style>{STYLE}</style><h1>{title}</h1><div class="{flagged}">{first}<ul>'
        f"{''.join(f'<li>{line}</li>' for line in others)}</ul></div>"
        f"{tables}{settings}<h2>Sanity checks</h2><ul>{checks}</ul></html>\n"
    )


def _state(triggered: bool) -> str:
    return "TRIGGERED" if triggered else "passed"
