"""How well a few labelled images of a site move a model's threshold: draws, and the rest judged.

    python tests/claims/recalibrate.py --model RUN/model --shards SHARDS --output FILE.json

Every draw takes patients of the test split until it has enough images, fits temperature and
threshold to them as jobs/recalibrate.py does, and judges the images of all other patients. The
scores are computed once. Prints a table, and writes it with every draw as JSON. The threshold is
for the largest sum of sensitivity and specificity, or for --sensitivity.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medspark.evaluate.config import DecisionConfig
from medspark.evaluate.decision import count_at
from medspark.evaluate.recalibrate import Goal, Sample, draw, interval, judge
from medspark.job import write_result
from medspark.models.deciding import decision_shift
from medspark.workflows.recalibrate import SiteSample
from medspark.workflows.recalibrate_config import RecalibrateConfig

SIZES, DRAWS = (50, 100, 200), 20
FIGURES = ("balanced_accuracy", "sensitivity", "specificity")


def judged(rest: Sample, cut: float) -> dict[str, float]:
    """Return the figures of the images ``rest`` at ``cut``."""
    counts = count_at(rest.scores, rest.positive, cut)
    assert counts.sensitivity is not None, "the rest holds both classes"
    assert counts.specificity is not None, "the rest holds both classes"
    balanced = (counts.sensitivity + counts.specificity) / 2
    return dict(zip(FIGURES, (balanced, counts.sensitivity, counts.specificity), strict=True))


def one_draw(
    images: Sample, goal: Goal, count: int, *, temperature: float, seed: int
) -> dict[str, Any]:
    """Return the figures of the rest after one draw, and whether the intervals hold them."""
    chosen, rest = draw(images.patients, count, seed=seed)
    site = judge(images.of(chosen), goal, temperature=temperature, resamples=0, seed=seed)
    found = judged(images.of(rest), site.fit.cut)
    held = {}
    for name in FIGURES[1:]:
        low, high = interval(getattr(site, name))
        held[f"{name}_held"] = low <= found[name] <= high
    return {
        "images": count, "seed": seed, "temperature": site.fit.temperature,
        "threshold": site.fit.threshold,
    } | found | held  # fmt: skip


def row(draws: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return mean and deviation of the figures of ``draws``, and the intervals' coverage."""
    found = {}
    for name in FIGURES:
        values = [each[name] for each in draws]
        found |= {name: statistics.mean(values), f"{name}_sd": statistics.stdev(values)}
    for name in FIGURES[1:]:
        found[f"{name}_held"] = statistics.mean(each[f"{name}_held"] for each in draws)
    return found


def study(site: SiteSample) -> dict[str, Any]:
    """Return the table by number of images, the draws, and the figures without recalibration."""
    images, goal = site.all_images(), site.goal
    draws = [
        one_draw(images, goal, count, temperature=site.card.temperature, seed=seed)
        for count in SIZES
        for seed in range(DRAWS)
    ]
    best = max(judged(images, cut)["balanced_accuracy"] for cut in np.unique(images.scores))
    return {
        "goal": f"{goal.criterion} {goal.target or ''}".strip(),
        "before": judged(images, decision_shift(site.card)),
        "best_balanced_accuracy": best,
        "table": {str(n): row([each for each in draws if each["images"] == n]) for n in SIZES},
        "draws": draws,
        "dataset_digest": site.manifest.digest,
    }


def table(found: dict[str, Any]) -> str:
    """Return the study as a Markdown table."""
    lines = [
        "| images | balanced accuracy | sensitivity | specificity | held (sens., spec.) |",
        "| --- | --- | --- | --- | --- |",
        "| 0 | " + " | ".join(f"{found['before'][name]:.3f}" for name in FIGURES) + " | |",
    ]
    for count, each in found["table"].items():
        cells = [f"{each[name]:.3f} ± {each[f'{name}_sd']:.3f}" for name in FIGURES]
        held = " ".join(f"{each[f'{name}_held']:.2f}" for name in FIGURES[1:])
        lines.append(f"| {count} | {' | '.join(cells)} | {held} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--sensitivity", type=float)
    parser.add_argument("--output", type=Path, default=Path("build/claims/recalibrate.json"))
    asked = parser.parse_args(argv)
    youden = asked.sensitivity is None
    config = RecalibrateConfig(
        model=asked.model,
        shards=asked.shards,
        split=asked.split,
        decision=DecisionConfig(youden=youden, sensitivity=asked.sensitivity),
    )
    found = study(SiteSample(config))
    print(table(found))
    print(f"Best balanced accuracy of any threshold: {found['best_balanced_accuracy']:.3f}")
    write_result(asked.output, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
