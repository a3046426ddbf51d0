"""Fit a model's temperature and threshold to a few labelled images of the place that will use it.

Reads   a model (folder or MLflow URI) and shards of the place's images
Writes  a new version of the model, the result as JSON, and one MLflow run

    spark-submit jobs/recalibrate.py --model MODEL --shards SITE --images 50

The threshold is chosen for what the card's decision says, or for --decision.sensitivity and so on.
With --track.register_as NAME the new version is registered. The job runs without Spark executors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medspark.job import JobConfig, run_job
from medspark.workflows.recalibrate_config import Estimate, RecalibrateConfig, RecalibrateResult


class RecalibrateJob(JobConfig, RecalibrateConfig):
    """Recalibrate one model."""


def work(config: RecalibrateJob) -> RecalibrateResult:
    """Recalibrate the model, print the summary, and return the result."""
    from medspark.workflows.recalibrate import recalibrate  # torch: not for --help

    output = config.output or Path("build/results/recalibrate.json")
    result = recalibrate(config, output=output)
    print(summary(result))
    return result


def summary(result: RecalibrateResult) -> str:
    """Return the figures, how sure they are, and the warning, as text."""
    names = ("temperature", "threshold", "sensitivity", "specificity")
    counts = ", ".join(f"{count} {name}" for name, count in result.class_counts.items())
    lines = [
        f"{result.images} images of {result.patients} patients: {counts}",
        *(f"{name:<12} {_text(getattr(result, name))}" for name in names),
        f"For both rates within .05, about {result.images_needed} images are needed.",
    ]
    if result.warning is not None:
        lines.append(f"Warning: {result.warning}")
    return "\n".join([*lines, f"Model: {result.model}"])


def _text(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def main(argv: Sequence[str]) -> int:
    """Run the job; return its exit status."""
    return run_job(RecalibrateJob, work, argv)
