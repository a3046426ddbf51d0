"""Attack a trained model, report its robustness, and flag results you should not trust.

Reads   a model (folder, ONNX file, or MLflow URI) and the shards that jobs/shard.py wrote
Writes  a report (Markdown, HTML, figures), the result as JSON, and one MLflow run

    spark-submit jobs/evaluate.py --model MODEL --shards DIR --attacks pgd --eps 0,1/255,2/255

To resume an evaluation that was killed, give the same command again.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from medspark.eps import eps_text
from medspark.evaluate.noise_result import noise_lines
from medspark.evaluate.result import ConditionFigures, EvaluationResult
from medspark.job import JobConfig, run_job
from medspark.spark.session import SparkConfig, spark_session
from medspark.workflows.evaluate_config import EvaluationConfig


class EvaluateJob(JobConfig, EvaluationConfig):
    """Evaluate one model."""

    spark: SparkConfig = Field(default_factory=SparkConfig)


def work(config: EvaluateJob) -> EvaluationResult:
    """Attack the model, print the table and the flags, and return the result."""
    from medspark.workflows.evaluate import Evaluation  # torch: not for --help

    evaluation = Evaluation(config)
    with spark_session(config.spark, name="medspark evaluate") as spark:
        result = evaluation.run(spark)
    print(_summary(result))
    return result


def _summary(result: EvaluationResult) -> str:
    sign = "⚠ " if result.triggered_flags else ""
    lines = [
        f"{'attack':>14} {'eps':>8} {'accuracy':>9} {'auroc':>7}",
        _row("clean", 0.0, result.clean),
        *(_row(f"{sign}{row.name}", row.eps, row) for row in (*result.attacks, *result.worst_case)),
    ]
    lines += [f"⚠ Do not trust these figures: {f.sentence}." for f in result.triggered_flags]
    if result.noise is not None:
        lines += ["", *noise_lines(result.noise), ""]
    if result.gallery:
        lines.append(
            f"{result.gallery} images of patients are in the report, and with it in MLflow; "
            "--gallery 0 leaves them out"
        )
    return "\n".join([*lines, f"report: {result.report}"])


def _row(name: str, eps: float, figures: ConditionFigures) -> str:
    auroc = "–" if figures.auroc is None else f"{figures.auroc:.3f}"
    return f"{name:>14} {eps_text(eps):>8} {figures.accuracy:>9.3f} {auroc:>7}"


def main(argv: Sequence[str]) -> int:
    """Run the job; return its exit status."""
    return run_job(EvaluateJob, work, argv)
