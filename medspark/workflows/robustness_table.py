"""Make the robustness table: one row per model, one column per figure."""

from __future__ import annotations

from collections.abc import Mapping

from medspark.eps import eps_text
from medspark.evaluate.result import ConditionFigures, RobustnessResult
from medspark.evaluate.sanity import SIGN

__all__ = ["flag_lines", "robustness_table"]


def robustness_table(results: Mapping[str, RobustnessResult]) -> str:
    """Return a Markdown table of accuracies (%), clean and per attack, and the clean AUROC.

    ``results`` maps row names to results of the same attacks. A row is marked ⚠ if a sanity check
    flagged its network; ``flag_lines`` gives the reasons.
    """
    columns = [_figures(result) for result in results.values()]
    head = ["model", *columns[0]]
    rows = [
        [f"{SIGN} {name}" if result.triggered_flags else name, *figures.values()]
        for (name, result), figures in zip(_named(results).items(), columns, strict=True)
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    rule = ["-" * width for width in widths]
    return "\n".join(_line(row, widths) for row in [head, rule, *rows])


def flag_lines(results: Mapping[str, RobustnessResult]) -> list[str]:
    """Return a sentence for every flag of the ``results`` in the table."""
    return [
        f"{SIGN} {name}: do not trust these figures: {flag.sentence}."
        for name, result in _named(results).items()
        for flag in result.triggered_flags
    ]


def _named(results: Mapping[str, RobustnessResult]) -> dict[str, RobustnessResult]:
    return {name or "this run": result for name, result in results.items()}


def _figures(result: RobustnessResult) -> dict[str, str]:
    figures = {"clean AUROC": _plain(result.clean.auroc), "clean acc.": _percent(result.clean)}
    for attack in result.attacks:
        steps = f"-{attack.steps}" if attack.steps > 1 else ""
        figures[f"{attack.name.upper()}{steps} {eps_text(attack.eps)}"] = _percent(attack)
    return figures


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"  # undefined if a class is absent


def _percent(figures: ConditionFigures) -> str:
    return "–" if figures.accuracy is None else f"{100 * figures.accuracy:.1f}"


def _line(cells: list[str], widths: list[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return "| " + " | ".join([first[0].ljust(first[1]), *[c.rjust(w) for c, w in others]]) + " |"
