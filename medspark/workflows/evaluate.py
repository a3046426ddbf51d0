"""Evaluate a model on Spark: each task attacks one piece of the test set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pyspark.sql import SparkSession

from medspark import ownership
from medspark.data.native import MappedSplit
from medspark.errors import UsageError
from medspark.evaluate.config import check_attacks, through_denoiser
from medspark.evaluate.gallery import Exhibit, exhibits, typical_rows
from medspark.evaluate.noise_result import NoiseResult
from medspark.evaluate.noisy_pieces import NoisyJob
from medspark.evaluate.operating_point import OperatingPoint
from medspark.evaluate.pieces import Job, fingerprint
from medspark.evaluate.report import write_report
from medspark.evaluate.result import EvaluationResult, RobustnessResult, metrics_by_name
from medspark.evaluate.summary import Arrays, predictions, summarise
from medspark.launch.pieces import do_pieces
from medspark.lock import locked
from medspark.models.card import read_card
from medspark.models.checkpoint import load_classifier
from medspark.models.local import local_model
from medspark.models.onnx import OnnxClassifier
from medspark.shards.manifest import Manifest
from medspark.track.runs import tracked
from medspark.track.spool import RunEntry
from medspark.workflows.attacked_data import AttackedData, resolve_model
from medspark.workflows.evaluate_config import EvaluationConfig
from medspark.workflows.figures import noise_metrics
from medspark.workflows.lineage import lineage

_OF_FINDINGS = (
    "the share of images with every finding right, at a probability of one half; label accuracy "
    "counts single findings, and attacks that stop at an image's first wrong one leave it high"
)


class Evaluation:
    """One evaluation: checked before Spark starts, run by Spark, reported by the driver."""

    def __init__(self, config: EvaluationConfig) -> None:
        """Find the model and the data. Raises UsageError if they are missing or do not fit."""
        self.data = AttackedData(config)
        model = resolve_model(config.model, uri=config.track.uri)
        surrogates = tuple(resolve_model(name, uri=config.track.uri) for name in config.surrogates)
        for path in (model, *surrogates):
            _check_fit(path, self.data.manifest)
        gradients = model.suffix != ".onnx"
        self.card = read_card(model) if gradients else None
        denoised = self.card is not None and self.card.denoiser is not None
        if denoised:
            config = config.model_copy(update={"attacks": through_denoiser(config.attacks)})
        check_attacks(
            config.attacks, gradients=gradients, surrogates=len(surrogates), denoised=denoised
        )
        self.config = config
        others = {f"the surrogate {path}": path for path in surrogates}
        sources = {"the model": model, **others, "the shards": config.shards}
        ownership.apart(sources, {"the folder of evaluations": config.folder})
        ownership.check(config.folder, "evaluation")
        job = Job(
            model=model.resolve(),
            surrogates=tuple(path.resolve() for path in surrogates),
            shards=config.shards.resolve(),
            split=config.split,
            config=config.attack_settings(),
            total=self.data.rows,
            piece=config.piece,
            work=config.folder.resolve(),
        )
        name = fingerprint(job, dataset_digest=self.data.manifest.digest)
        self.folder = config.folder / name
        self.job = replace(job, work=self.folder.resolve() / "pieces")

    def run(self, spark: SparkSession) -> EvaluationResult:
        """Run the missing pieces, write the report, and return the result document."""
        entry = RunEntry(
            name=f"evaluate {Path(self.config.model).name}",
            config=self.config.model_dump(mode="json"),
            tags={"medspark.job": "evaluate"} | lineage(model=self.job.model),
            dataset=self.data.entry,
        )
        ownership.claim(self.config.folder, "evaluation")
        self.folder.mkdir(exist_ok=True)
        with (
            locked(self.folder),
            tracked(self.folder / "mlflow", self.config.track, entry) as run,
        ):
            do_pieces(spark, self.job, total=len(self.job.rows), unit="image", doing="attacked")
            noise = self._noise(spark)
            result, shown = self._report(noise)
            run.end(
                "FINISHED",
                summary=_metrics(result) | noise_metrics(noise),
                artifacts=self.folder / "report",
                patience_seconds=self.config.track.patience_seconds,
            )
            reference = run.reference
        return EvaluationResult.model_validate(
            result.as_json()
            | ({} if noise is None else {"noise": noise.as_json()})
            | {
                "model": self.config.model,
                "dataset_digest": self.data.manifest.digest,
                "split": self.config.split,
                "norm": self.config.norm,
                "report": str(self.folder / "report" / "report.html"),
                "gallery": shown,
                "mlflow": reference,
            }
        )

    def _noise(self, spark: SparkSession) -> NoiseResult | None:
        """Judge a network that has noisy weights with its noise; None for any other model."""
        model = self.job.model
        pruning = None if self.card is None else self.card.pruning
        if pruning is None or not pruning.noise or max(self.config.eps, default=0.0) == 0:
            return None
        job = NoisyJob(
            model=model,
            shards=self.job.shards,
            split=self.job.split,
            config=self.job.config,
            total=self.job.total,
            piece=self.job.piece,
            work=self.job.work / "noise",
        )
        do_pieces(spark, job, total=len(job.rows), unit="image", doing="judged with noise")
        return job.result()

    def _report(self, noise: NoiseResult | None) -> tuple[RobustnessResult, int]:
        """Write the report; return the result and the number of images that it shows."""
        arrays, trials = self.job.arrays(), self.job.config.trials()
        result = summarise(
            arrays,
            trials,
            limits=self.job.config.sanity,
            positive=self._positive(self.data.positive),
            detail=self.data.detail(arrays["rows"]),
        )
        if self.card is not None and self.card.decision is not None:
            result = result.model_copy(update={"decision": self.card.decision})
        eps = max(self.config.eps, default=0.0)
        shown = self._exhibits(arrays, eps)
        write_report(
            self.folder / "report",
            result,
            predictions(arrays, trials),
            title=f"Robustness of {Path(self.config.model).name}",
            facts=self._facts(result) | ({} if noise is None else {"noise": noise.sentence}),
            classes=self.data.manifest.classes,
            positive=self._positive(self.data.drawn),
            point=None if self.card is None else OperatingPoint.of(self.card),
            shown=shown,
            shown_eps=eps,
        )
        return result, len(shown)

    def _positive(self, otherwise: int | None) -> int | None:
        """Return the positive class: the one asked for, the decision's, or ``otherwise``."""
        own = None if self.card is None else self.card.positive
        return otherwise if own is None or self.config.positive is not None else own

    def _facts(self, result: RobustnessResult) -> dict[str, str]:
        manifest = self.data.manifest
        patients = manifest.splits[self.config.split].patients
        return ({"accuracy": _OF_FINDINGS} if manifest.multi_label else {}) | {
            "model": self.config.model,
            "shards": self.data.shards,
            "images": f"{result.images} of {self.data.rows} {self.config.split} images, "
            f"{patients} patients in the split",
            "threat model": f"{self.config.norm}; eps is a fraction of [0, 1], after windowing",
            "intervals": f"95 %, {self.config.bootstrap} bootstrap resamples of the patients",
            "seed": str(self.config.seed),
        }

    def _exhibits(self, arrays: Arrays, eps: float) -> list[Exhibit]:
        if self.config.gallery == 0 or self.job.model.suffix == ".onnx":
            return []
        split = MappedSplit(self.config.shards, self.data.manifest, self.config.split)
        rows = arrays["rows"][typical_rows(arrays["labels"], self.config.gallery)]
        images, truth = split.tensors(rows)
        threat = self.job.config.threat(eps)
        return exhibits(load_classifier(self.job.model), images, truth, threat=threat)


def _check_fit(path: Path, manifest: Manifest) -> None:
    model = OnnxClassifier(local_model(path)) if path.suffix == ".onnx" else read_card(path)
    if difference := model.misfit(manifest):
        raise UsageError(f"The model '{path}' does not fit: {difference}.")


def _metrics(result: RobustnessResult) -> dict[str, float]:
    """Return the figures by their MLflow metric names."""
    return metrics_by_name(result.figures()) | {
        "flags_triggered": float(len(result.triggered_flags))
    }
