"""Evaluate a model on Spark: each task attacks one piece of the test set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from pyspark.sql import SparkSession

from medspark import ownership
from medspark.data.native import MappedSplit
from medspark.errors import UsageError
from medspark.evaluate.config import check_attacks
from medspark.evaluate.gallery import Exhibit, exhibits, typical_rows
from medspark.evaluate.noise_result import NoiseResult
from medspark.evaluate.noisy_pieces import NoisyJob
from medspark.evaluate.pieces import Job, fingerprint
from medspark.evaluate.report import write_report
from medspark.evaluate.result import EvaluationResult, RobustnessResult, metrics_by_name
from medspark.evaluate.summary import Array, Arrays, Detail, predictions, summarise
from medspark.launch.pieces import do_pieces
from medspark.lock import locked
from medspark.models.card import read_card
from medspark.models.checkpoint import load_classifier
from medspark.models.onnx import OnnxClassifier
from medspark.shards.manifest import Manifest, read_manifest, verify
from medspark.track.models import fetch_model
from medspark.track.runs import tracked
from medspark.track.spool import DatasetEntry, RunEntry
from medspark.workflows.evaluate_config import AttackedShards, EvaluationConfig, positive_class
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
        self.config = config
        self.manifest = read_manifest(config.shards)
        verify(config.shards, self.manifest, contents=False)
        if config.split not in self.manifest.splits or not self._split_rows():
            raise UsageError(f"The shards in {config.shards} have no {config.split} images.")
        model = resolve_model(config.model, uri=config.track.uri)
        surrogates = tuple(resolve_model(name, uri=config.track.uri) for name in config.surrogates)
        for path in (model, *surrogates):
            _check_fit(path, self.manifest)
        gradients = model.suffix != ".onnx"
        check_attacks(config.attacks, gradients=gradients, surrogates=len(surrogates))
        self.positive = positive_class(config.positive, self.manifest.classes)
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
            total=self._split_rows(),
            piece=config.piece,
            work=config.folder.resolve(),
        )
        name = fingerprint(job, dataset_digest=self.manifest.digest)
        self.folder = config.folder / name
        self.job = Job(**(vars(job) | {"work": self.folder.resolve() / "pieces"}))

    def run(self, spark: SparkSession) -> EvaluationResult:
        """Run the missing pieces, write the report, and return the result document."""
        entry = RunEntry(
            name=f"evaluate {Path(self.config.model).name}",
            config=self.config.model_dump(mode="json"),
            tags={"medspark.job": "evaluate"} | lineage(model=self.job.model),
            dataset=DatasetEntry(
                name=self.config.split,
                digest=self.manifest.digest,
                source=str(self.config.shards),
            ),
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
                "dataset_digest": self.manifest.digest,
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
        pruning = None if model.suffix == ".onnx" else read_card(model).pruning
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
        classes = self.manifest.classes
        result = summarise(
            arrays,
            trials,
            limits=self.job.config.sanity,
            positive=self.positive,
            detail=Detail(
                groups=patients_of(self.config, self.manifest, arrays["rows"]),
                samples=self.config.bootstrap,
                classes=classes,
                seed=self.config.seed,
            ),
        )
        eps = max(self.config.eps, default=0.0)
        shown = self._exhibits(arrays, eps)
        write_report(
            self.folder / "report",
            result,
            predictions(arrays, trials),
            title=f"Robustness of {Path(self.config.model).name}",
            facts=self._facts(result) | ({} if noise is None else {"noise": noise.sentence}),
            classes=classes,
            positive=self._drawn(),
            shown=shown,
            shown_eps=eps,
        )
        return result, len(shown)

    def _drawn(self) -> int | None:
        """Return the class of the ROC curve; None draws one curve over all findings."""
        if self.positive is None and not self.manifest.multi_label:
            return len(self.manifest.classes) - 1
        return self.positive

    def _facts(self, result: RobustnessResult) -> dict[str, str]:
        patients = self.manifest.splits[self.config.split].patients
        return ({"accuracy": _OF_FINDINGS} if self.manifest.multi_label else {}) | {
            "model": self.config.model,
            "shards": f"{self.config.shards}, digest {self.manifest.digest[:12]}",
            "images": f"{result.images} of {self._split_rows()} {self.config.split} images, "
            f"{patients} patients in the split",
            "threat model": f"{self.config.norm}; eps is a fraction of [0, 1], after windowing",
            "intervals": f"95 %, {self.config.bootstrap} bootstrap resamples of the patients",
            "seed": str(self.config.seed),
        }

    def _exhibits(self, arrays: Arrays, eps: float) -> list[Exhibit]:
        if self.config.gallery == 0 or self.job.model.suffix == ".onnx":
            return []
        split = MappedSplit(self.config.shards, self.manifest, self.config.split)
        rows = arrays["rows"][typical_rows(arrays["labels"], self.config.gallery)]
        images, truth = split.tensors(rows)
        threat = self.job.config.threat(eps)
        return exhibits(load_classifier(self.job.model), images, truth, threat=threat)

    def _split_rows(self) -> int:
        return self.manifest.splits[self.config.split].rows


def patients_of(config: AttackedShards, manifest: Manifest, rows: Array) -> Array:
    """Return the patient of each of ``rows`` of the split (N,), for the intervals."""
    keys = [
        pq.read_table(config.shards / shard.path, columns=["patient_key"])["patient_key"]
        for shard in manifest.splits[config.split].shards
    ]
    patients: Array = np.concatenate([column.to_numpy() for column in keys])
    return patients[rows].astype(str)


def resolve_model(name: str, *, uri: str | None) -> Path:
    """Return the folder or file of the model ``name``, fetched from MLflow if it is an MLflow URI.

    Raises UsageError for an ONNX file or a model folder that does not exist.
    """
    if name.startswith(("models:/", "runs:/")):
        return fetch_model(name, uri=uri)
    path = Path(name)
    if path.suffix == ".onnx":
        if not path.is_file():
            raise UsageError(f"model: there is no file '{path}'.")
        return path
    read_card(path)
    return path


def _check_fit(path: Path, manifest: Manifest) -> None:
    model = OnnxClassifier(path) if path.suffix == ".onnx" else read_card(path)
    if difference := model.misfit(manifest):
        raise UsageError(f"The model '{path}' does not fit: {difference}.")


def _metrics(result: RobustnessResult) -> dict[str, float]:
    """Return the figures by their MLflow metric names."""
    return metrics_by_name(result.figures()) | {
        "flags_triggered": float(len(result.triggered_flags))
    }
