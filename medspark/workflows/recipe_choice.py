"""Choose recipes by their figures on validation images: pure functions of the records."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from medspark.evaluate.result import CLEAN, WORST
from medspark.study.recipe_report import DEFAULT, RecipeCell, Standing

__all__ = ["best", "finalists", "standings"]


def standings(
    records: Iterable[RecipeCell],
    *,
    recipes: Sequence[str],
    sets: Sequence[str],
    seeds: Sequence[int],
    eps: float,
    metric: str,
    margin: float,
) -> list[Standing]:
    """Return how ``recipes`` did on the validation images of ``sets`` by ``seeds``, best first.

    The score is ``metric`` in the worst case at ``eps``: the mean over the sets of the mean over
    the seeds. A recipe cannot be chosen if a cell of it is missing or flagged, or if its clean
    AUROC on a set is more than ``margin`` below the default's. Test figures do not count.
    """
    screened = [
        cell
        for cell in records
        if cell.stage == "screening" and cell.finished and cell.seed in seeds
    ]
    reference = _clean(screened, DEFAULT)
    found = []
    for recipe in recipes:
        cells = [cell for cell in screened if cell.recipe == recipe]
        clean = _clean(screened, recipe)
        done = {(cell.dataset, cell.seed) for cell in cells}
        reason = ""
        if not done >= {(name, seed) for name in sets for seed in seeds}:
            reason = "not every training is finished"
        elif unknown := [name for name in sets if name not in reference]:
            reason = f"the default has no clean AUROC on {', '.join(unknown)}"
        elif any(cell.flagged for cell in cells):
            reason = "flagged"
        elif lost := _lost(clean, reference, margin):
            reason = f"clean AUROC too far below the default's on {', '.join(lost)}"
        score = _score(cells, sets, metric=metric, eps=eps)
        found.append(Standing(recipe=recipe, score=score, clean=clean, reason=reason))
    return sorted(found, key=_order)


def finalists(found: Iterable[Standing], count: int) -> tuple[str, ...]:
    """Return the ``count`` best recipes that can be chosen, besides the default."""
    good = [each.recipe for each in found if each.eligible and each.recipe != DEFAULT]
    return tuple(good[:count])


def best(found: Iterable[Standing]) -> str | None:
    """Return the best recipe that can be chosen, the default at equal scores; None if none can."""
    return next((each.recipe for each in sorted(found, key=_order) if each.eligible), None)


def _order(each: Standing) -> tuple[bool, float, bool, str]:
    score = float("-inf") if each.score is None else each.score
    return not each.eligible, -score, each.recipe != DEFAULT, each.recipe


def _lost(clean: dict[str, float], reference: dict[str, float], margin: float) -> list[str]:
    """Return the sets on which ``clean`` is more than ``margin`` below ``reference``."""
    return [name for name in reference if clean.get(name, 0.0) < reference[name] - margin]


def _clean(cells: Iterable[RecipeCell], recipe: str) -> dict[str, float]:
    """Return the clean AUROC of ``recipe`` by set, mean over the seeds."""
    values: dict[str, list[float]] = {}
    for cell in cells:
        value = cell.value(CLEAN, "auroc")
        if cell.recipe == recipe and value is not None:
            values.setdefault(cell.dataset, []).append(value)
    return {name: statistics.fmean(found) for name, found in values.items()}


def _score(
    cells: Iterable[RecipeCell], sets: Sequence[str], *, metric: str, eps: float
) -> float | None:
    """Return the mean over ``sets`` of the mean over the seeds; None if a set has no figure."""
    values: dict[str, list[float]] = {name: [] for name in sets}
    for cell in cells:
        value = cell.value(WORST, metric, eps)
        if value is not None and cell.dataset in values:
            values[cell.dataset].append(value)
    if not values or not all(values.values()):
        return None
    return statistics.fmean(statistics.fmean(found) for found in values.values())
