"""Export a model for devices without torch, and attack the exported graphs on Spark."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyspark.sql import SparkSession

from medspark import ownership
from medspark.attacks.config import AttackName
from medspark.errors import UsageError
from medspark.evaluate.operating_point import OperatingPoint
from medspark.evaluate.pieces import Job, fingerprint
from medspark.evaluate.report import write_report
from medspark.evaluate.result import RobustnessResult, metrics_by_name
from medspark.evaluate.summary import (
    Arrays,
    Predictions,
    Trial,
    predictions,
    summarise,
)
from medspark.export.deployed import ComparedJob, DeployedJob
from medspark.export.latency import Measured, measure, measured_by
from medspark.export.parity import flags, parity
from medspark.export.parity_report import write_parity_report
from medspark.export.processor import dot_product
from medspark.export.result import Artifact, ExportResult, Latency
from medspark.files import json_digest, write_whole
from medspark.launch.pieces import do_pieces
from medspark.lock import locked
from medspark.models.card import columns_of, read_card
from medspark.models.checkpoint import load_classifier
from medspark.track.runs import tracked
from medspark.track.spool import ModelEntry, RunEntry
from medspark.workflows.attacked_data import AttackedData, resolve_model
from medspark.workflows.export_artifacts import Made, make_artifacts
from medspark.workflows.export_edge_config import ExportEdgeConfig
from medspark.workflows.lineage import lineage

__all__ = ["EdgeExport"]

_TWIN_ATTACKS: tuple[AttackName, ...] = ("pgd", "pgd_margin", "square")
_DEPLOYED_ATTACKS: tuple[AttackName, ...] = ("transfer", "square")
_RESULT = "export.json"


class EdgeExport:
    """One export: checked before Spark starts, made by the driver, attacked by Spark."""

    def __init__(self, config: ExportEdgeConfig) -> None:
        """Find model, data and backends. Raises UsageError if one is missing or does not fit."""
        self.config = config
        self.data = AttackedData(config)
        self.data.check_split("train")  # it calibrates
        model = resolve_model(config.model, uri=config.track.uri)
        if model.suffix == ".onnx":
            raise UsageError(f"model: '{model}' is exported already; give the network's folder.")
        self.card = read_card(model)
        if difference := self.card.misfit(self.data.manifest):
            raise UsageError(f"The model '{model}' does not fit: {difference}.")
        ownership.apart(
            {"the model": model, "the shards": config.shards},
            {"the folder of exports": config.folder},
        )
        ownership.check(config.folder, "exports")
        self.twin = Job(
            model=model.resolve(),
            surrogates=(),
            shards=config.shards.resolve(),
            split=config.split,
            config=config.settings_of(_TWIN_ATTACKS),
            total=self.data.rows,
            piece=config.piece,
            work=config.folder.resolve(),
        )
        asked = {
            "twin": fingerprint(self.twin, dataset_digest=self.data.manifest.digest),
            "asked": [config.precision, config.backend, config.calibration_images],
            "processor": dot_product(),
        }
        self.folder = config.folder.resolve() / json_digest(asked)[:16]
        self.twin = replace(self.twin, work=self.folder / "pieces" / "twin")

    def run(self, spark: SparkSession) -> ExportResult:
        """Make what is missing, attack it, write the report, and return the result document."""
        ownership.claim(self.config.folder, "exports")
        self.folder.mkdir(exist_ok=True)
        with (
            locked(self.folder),
            tracked(self.folder / "mlflow" / "export", self.config.track, self._entry()) as run,
        ):
            made = make_artifacts(self.config, self.data.manifest, self.twin.model, self.folder)
            # Measured before the attacks, which use every core.
            twin_latency = self._twin_latency()
            measured = {each.name: self._measure(each) for each in made}
            logits = self._compare(spark, made)
            twin, _ = self._attack(spark, self.twin, (), "the torch network")
            exports = [self._artifact(spark, each, measured, logits, twin) for each in made]
            result = ExportResult(
                model=self.config.model,
                architecture=self.card.architecture,
                dataset_digest=self.data.manifest.digest,
                split=self.config.split,
                norm=self.config.norm,
                processor=dot_product(),
                twin=twin,
                twin_latency_ms=twin_latency,
                artifacts=tuple(exports),
                report=str(self.folder / "report" / "report.html"),
                mlflow={},
            )
            self._report(result)
            run.end(
                "FINISHED",
                summary=_metrics(result),
                artifacts=self.folder / "report",
                patience_seconds=self.config.track.patience_seconds,
            )
            reference = run.reference
        for each in exports:
            self._log(each, parent=reference["run_id"])
        return result.model_copy(update={"mlflow": reference})

    def _entry(self) -> RunEntry:
        return RunEntry(
            name=f"export {Path(self.config.model).name}",
            config=self.config.model_dump(mode="json"),
            tags={"medspark.job": "export_edge"} | lineage(model=self.twin.model),
            dataset=self.data.entry,
        )

    def _twin_latency(self) -> Latency:
        model = load_classifier(self.twin.model)
        shape = (1, self.card.channels, self.card.height, self.card.width)
        image = np.random.default_rng(0).random(shape, dtype=np.float32)
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                seconds = measured_by(
                    lambda pixels: model(torch.from_numpy(pixels)),
                    image,
                    images=self.config.latency_images,
                )
        finally:
            torch.set_num_threads(before)
        median, p99 = 1000 * np.percentile(seconds, [50, 99])
        return Latency(median=float(median), p99=float(p99))

    def _measure(self, made: Made) -> tuple[Measured, Measured]:
        images = self.config.latency_images
        one, two = (measure(made.folder, threads=threads, images=images) for threads in (1, 2))
        return one, two

    def _compare(self, spark: SparkSession, made: Sequence[Made]) -> Arrays:
        """Return the logits of the twin and of every export, on all images of the split."""
        job = ComparedJob(
            twin=self.twin.model,
            exports=tuple(each.folder for each in made),
            shards=self.twin.shards,
            split=self.config.split,
            total=self.twin.total,
            piece=self.config.piece,
            batch=self.config.batch_size,
            work=self.folder / "pieces" / f"compared-{json_digest([e.digest for e in made])[:12]}",
        )
        do_pieces(spark, job, total=job.total, unit="image", doing="compared")
        return job.arrays()

    def _attack(
        self, spark: SparkSession, job: Job | DeployedJob, own: tuple[str, ...], what: str
    ) -> tuple[RobustnessResult, Predictions]:
        do_pieces(spark, job, total=len(job.rows), unit="image", doing=f"attacked {what}")
        arrays = job.arrays()
        trials: list[Trial] = job.config.trials(own)
        result = summarise(
            arrays,
            trials,
            limits=job.config.sanity,
            positive=self._positive(self.data.positive),
            detail=self.data.detail(arrays["rows"]),
        )
        if self.card.decision is not None:
            result = result.model_copy(update={"decision": self.card.decision})
        return result, predictions(arrays, trials)

    def _artifact(
        self,
        spark: SparkSession,
        made: Made,
        measured: dict[str, tuple[Measured, Measured]],
        logits: Arrays,
        twin: RobustnessResult,
    ) -> Artifact:
        job = DeployedJob(
            model=made.folder,
            twin=self.twin.model,
            surrogate=made.surrogate if made.precision == "int8" else None,
            shards=self.twin.shards,
            split=self.config.split,
            config=self.config.settings_of(_DEPLOYED_ATTACKS),
            total=self.twin.total,
            piece=self.config.piece,
            work=self.folder / "pieces" / f"{made.name}-{made.digest[:12]}",
        )
        result, predicted = self._attack(spark, job, job.own_attacks, made.name)
        found = parity(logits["labels"], logits["twin"], logits[made.name])
        checks = (*result.flags, *flags(found, made.precision, twin, result))
        believable = not any(flag.triggered for flag in checks)
        result = result.model_copy(update={"flags": checks, "believable": believable})
        self._write_details(made, result, predicted)
        one, two = measured[made.name]
        return Artifact.model_validate(
            result.as_json()
            | {
                "backend": made.backend,
                "precision": made.precision,
                "path": str(made.folder),
                "bytes": made.bytes,
                "numbers": made.numbers,
                "tried": made.tried,
                "layers": made.layers,
                "latency_ms": {"median": one.median, "p99": one.p99},
                "latency_ms_2_threads": {"median": two.median, "p99": two.p99},
                "peak_bytes": one.peak_bytes,
                "parity": found,
            }
        )

    def _write_details(self, made: Made, result: RobustnessResult, predicted: Predictions) -> None:
        write_report(
            self.folder / "report" / made.name,
            result,
            predicted,
            title=f"Robustness of {self.card.architecture}, {made.backend} {made.precision}",
            facts=self._facts(),
            classes=self.data.manifest.classes,
            positive=self._positive(self.data.drawn),
            point=OperatingPoint.of(made.card),
        )

    def _positive(self, otherwise: int | None) -> int | None:
        """Return the positive class: the one asked for, the decision's, or ``otherwise``."""
        own = self.card.positive
        return otherwise if own is None or self.config.positive is not None else own

    def _facts(self) -> dict[str, str]:
        effort = self.config.settings_of(_DEPLOYED_ATTACKS).effort
        return {
            "model": self.config.model,
            "shards": self.data.shards,
            "images": f"answers of all {self.data.rows} {self.config.split} images, attacks on "
            f"{len(self.twin.rows)}",
            "attacks on the torch network": f"PGD-{effort.steps} on the cross-entropy and on the "
            f"margin, Square with {effort.queries} queries, on the network itself",
            "attacks on an export": f"transfer (PGD-{effort.steps} on the torch network's margin), "
            f"straight through (PGD-{effort.steps} on the fake-quantised graph), Square with "
            f"{effort.queries} queries on the graph itself; worst case: per image",
            "processor": dot_product() or "no instructions for sums of 8-bit products",
        }

    def _report(self, result: ExportResult) -> None:
        earlier = [
            each for each in _earlier(self.config.folder, but=self.folder)
            if each.dataset_digest == result.dataset_digest and each.split == result.split
        ]  # fmt: skip
        write_parity_report(self.folder / "report", result, facts=self._facts(), earlier=earlier)
        write_whole(self.folder / _RESULT, json.dumps(result.as_json()) + "\n")

    def _log(self, each: Artifact, *, parent: str | None) -> None:
        """Log one export as an MLflow model, in a run below that of the export."""
        name = f"{each.backend}-{each.precision}"
        track = self.config.track.model_copy(update={"parent_run_id": parent, "run_name": None})
        entry = self._entry().model_copy(
            update={"name": f"{self.card.architecture} {each.backend} {each.precision}"}
        )
        model = ModelEntry(
            folder=Path(each.path),
            loader="medspark.export.runtime:DeployedModel.load",
            input_shape=(
                self.data.manifest.height,
                self.data.manifest.width,
                self.data.manifest.channels,
            ),
            outputs=len(self.data.manifest.classes),
            classes=columns_of(self.data.manifest.classes),
            packages=(each.backend, "pillow"),
        )
        with tracked(self.folder / "mlflow" / name, track, entry) as run:
            run.end(
                "FINISHED",
                params={"numbers": each.numbers},
                summary=metrics_by_name(each.figures()) | _cost(each),
                model=model if track.log_model else None,
                patience_seconds=track.patience_seconds,
            )


def _earlier(folder: Path, *, but: Path) -> Iterator[ExportResult]:
    """Yield the results of the other exports in ``folder`` that this version can read."""
    for path in sorted(folder.glob(f"*/{_RESULT}")):
        if path.parent.resolve() != but:
            with suppress(OSError, ValueError):  # pydantic's ValidationError is a ValueError
                yield ExportResult.model_validate_json(path.read_text(encoding="utf-8"))


def _metrics(result: ExportResult) -> dict[str, float]:
    """Return the figures of all exports by their MLflow names."""
    found = metrics_by_name(result.twin.figures(), prefix="torch/")
    found["torch/latency_ms"] = result.twin_latency_ms.median
    for each in result.artifacts:
        prefix = f"{each.backend}-{each.precision}/"
        found |= metrics_by_name(each.figures(), prefix=prefix)
        found |= {prefix + name: value for name, value in _cost(each).items()}
    return found


def _cost(each: Artifact) -> dict[str, Any]:
    return {
        "bytes": float(each.bytes),
        "latency_ms": each.latency_ms.median,
        "latency_p99_ms": each.latency_ms.p99,
        "peak_bytes": float(each.peak_bytes),
        "largest_difference": each.parity.largest_difference,
        "same_answers": each.parity.same_answers,
        "flags_triggered": float(len(each.triggered_flags)),
    }
