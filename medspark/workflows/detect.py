"""Fit detectors on Spark, keep the best as the model's guard, and attack through all of them."""

from __future__ import annotations

from pathlib import Path

import torch
from pyspark.sql import SparkSession
from torch import Tensor, nn

from medspark import ownership
from medspark.defend.detect.checks import detector_flags
from medspark.defend.detect.choose import Choice, choose, fit_all, training_of
from medspark.defend.detect.conformal import needed
from medspark.defend.detect.detector import Detector
from medspark.defend.detect.features import PENULTIMATE, chosen_layers, find_layers
from medspark.defend.detect.figures import (
    Scores,
    false_positives,
    rank_defence,
    surrogate_fidelity,
)
from medspark.defend.detect.gather import features_of
from medspark.defend.detect.generalise import generalisation
from medspark.defend.detect.guard import Guard, save_guard
from medspark.defend.detect.pieces import (
    ExamineJob,
    FeatureJob,
    keep_fitted,
    read_fitted,
)
from medspark.defend.detect.registry import grid, layers_of
from medspark.defend.detect.report import metrics, write_detection_report
from medspark.defend.detect.result import Chosen, DetectResult, Generalisation
from medspark.defend.detect.served import copy_guarded
from medspark.eps import eps_text
from medspark.errors import UsageError
from medspark.evaluate.config import check_attacks
from medspark.evaluate.summary import Arrays
from medspark.files import json_digest, sha256_of
from medspark.launch.pieces import do_pieces
from medspark.lock import locked
from medspark.models.card import WEIGHTS, read_card
from medspark.models.checkpoint import load_classifier
from medspark.models.local import local_model
from medspark.remote import is_remote
from medspark.shards.manifest import Manifest, read_manifest, verify
from medspark.shards.schema import read_patients, read_sites
from medspark.track.runs import tracked
from medspark.track.spool import DatasetEntry, ModelEntry, RunEntry
from medspark.workflows.attacked_data import resolve_model
from medspark.workflows.detect_config import DetectConfig
from medspark.workflows.detect_parts import Part, Parts
from medspark.workflows.model_description import model_entry

__all__ = ["Detection"]


class Detection:
    """One detection: checked before Spark starts, shared out by Spark, judged by the driver."""

    def __init__(self, config: DetectConfig) -> None:
        """Find model, layers and data. Raises UsageError if they are missing or do not fit."""
        self.config = config
        self.manifest = read_manifest(config.shards)
        verify(config.shards, self.manifest, contents=False)
        self.parts = Parts(config, self.manifest)
        self.model = _classifier_folder(config.model, config, self.manifest)
        self.surrogates = tuple(
            _classifier_folder(name, config, self.manifest) for name in config.surrogates
        )
        network = load_classifier(self.model)
        shape = (1, self.manifest.channels, self.manifest.height, self.manifest.width)
        known = find_layers(network, torch.full(shape, 0.5))
        tapped = chosen_layers(config.layers, known, network)
        self.pairs = grid(config.detectors, tapped)
        self.layers = tuple(dict.fromkeys([*tapped, *layers_of(self.pairs)]))
        self.head = known.head
        self._check()
        self.guard_folder = config.guard_folder or _beside(config, self.model)
        ownership.apart(
            {"the model": self.model, "the shards": config.shards},
            {"the folder of detections": config.folder, "the guard": self.guard_folder},
        )
        ownership.check(config.folder, "detections")
        ownership.check(self.guard_folder, "guard")
        self.folder = config.folder.resolve() / self._fingerprint()

    def run(self, spark: SparkSession) -> DetectResult:
        """Do what is missing, keep the guard, write the report, and return the result document."""
        ownership.claim(self.config.folder, "detections")
        ownership.claim(self.guard_folder, "guard")
        self.folder.mkdir(exist_ok=True)
        with (
            locked(self.folder),
            locked(self.guard_folder),
            tracked(self.folder / "mlflow", self.config.track, self._entry()) as run,
        ):
            choosing = self._gather(spark, "choosing")
            calibration = self._gather(spark, "calibration")
            detectors, choice = self._fitted(spark, choosing, calibration)
            unseen = self._generalisation(spark, choosing) if self.config.fit.left_out else []
            arrays = self._examine(spark)
            result = self._result(detectors, choice, calibration, arrays)
            result = result.model_copy(update={"generalisation": tuple(unseen)})
            write_detection_report(self.folder / "report", result, facts=self._facts(result))
            run.end(
                "FINISHED",
                summary=metrics(result),
                artifacts=self.folder / "report",
                model=self._served() if self.config.track.log_model else None,
                patience_seconds=self.config.track.patience_seconds,
            )
            reference = run.reference
        return result.model_copy(update={"mlflow": reference})

    # --- what is checked before Spark starts ---

    def _check(self) -> None:
        if self.manifest.multi_label:
            raise UsageError("shards: a detector needs images of one class each, not findings.")
        for split in ("train", "val", "test"):
            if split not in self.manifest.splits or not self.manifest.splits[split].rows:
                raise UsageError(f"The shards in {self.config.shards} have no {split} images.")
        if not self.pairs:
            raise UsageError(
                f"detectors: none of {', '.join(self.config.detectors)} can look at the layers "
                f"{', '.join(self.layers)}."
            )
        if "bu" in self.config.detectors and PENULTIMATE not in self.layers:
            raise UsageError("detectors: bu looks at the layer penultimate; add it to layers.")
        attacks = (*self.config.attacks, *self.config.fit.attacks)
        check_attacks(
            attacks,
            gradients=True,
            surrogates=len(self.surrogates),
            denoised=read_card(self.model).denoiser is not None,
        )
        if min((*self.config.eps, *(self.config.fit.eps or ()))) <= 0:
            raise UsageError("eps: a detector needs attacks, so every budget is larger than 0.")
        calibrating = len(self.parts.rows("calibration"))
        if calibrating < needed(self.config.fpr):
            raise UsageError(
                f"fpr: a rate of {self.config.fpr:g} needs {needed(self.config.fpr)} validation "
                f"images for the threshold, and there are {calibrating}; give a larger rate, or "
                "more fit.validation_images."
            )

    def _fingerprint(self) -> str:
        """Return a hash of all that decides the arrays: networks, data and settings."""
        decisive = {
            "models": [
                [sha256_of(local_model(path) / WEIGHTS), read_card(path).model_dump_json()]
                for path in (self.model, *self.surrogates)
            ],
            "data": self.manifest.digest,
            "config": self.config.model_dump(mode="json", include=_decisive()),
            "layers": self.layers,
        }
        return json_digest(decisive)[:16]

    # --- what Spark shares out ---

    def _gather(self, spark: SparkSession, part: Part) -> Arrays:
        job = FeatureJob(
            model=self.model.resolve(),
            surrogates=tuple(path.resolve() for path in self.surrogates),
            shards=self.config.shards.resolve(),
            split=self.parts.split(part),
            chosen=tuple(self.parts.rows(part).tolist()),
            layers=self.layers,
            head=self.head,
            attacks=self.parts.attacks(part),
            bits=self.manifest.bits,
            piece=self.config.piece,
            work=self.folder / part,
        )
        doing = f"{part} images {'attacked' if job.attacks.attacks else 'read'}"
        do_pieces(spark, job, total=len(job.rows), unit="image", doing=doing)
        return job.arrays()

    def _fitted(
        self, spark: SparkSession, choosing: Arrays, calibration: Arrays
    ) -> tuple[tuple[Detector, ...], Choice]:
        """Return the detectors and the choice; they are fitted once for a folder."""
        trials = self.parts.attacks("test").trials()
        place = self.folder / "fitted"
        if (place / "fitted.json").is_file():
            detectors = tuple(read_fitted(place)[0])
            return detectors, choose(detectors, choosing, calibration, trials)
        training = training_of(
            self._gather(spark, "reference"),
            self._gather(spark, "contrast"),
            self.parts.learnt().trials(),
            head=_head(load_classifier(self.model), self.head),
            seed=self.config.seed,
        )
        detectors = fit_all(self.pairs, training)
        choice = choose(detectors, choosing, calibration, trials)
        keep_fitted(place, detectors, choice.targets)
        return detectors, choice

    def _generalisation(self, spark: SparkSession, choosing: Arrays) -> list[Generalisation]:
        return generalisation(
            self.pairs,
            self._gather(spark, "reference"),
            self._gather(spark, "contrast"),
            choosing,
            self.parts.attacks("test").trials(),
            head=_head(load_classifier(self.model), self.head),
            seed=self.config.seed,
        )

    def _examine(self, spark: SparkSession) -> Arrays:
        job = ExamineJob(
            model=self.model.resolve(),
            surrogates=tuple(path.resolve() for path in self.surrogates),
            shards=self.config.shards.resolve(),
            split="test",
            chosen=tuple(self.parts.rows("test").tolist()),
            head=self.head,
            fitted=self.folder / "fitted",
            oblivious=self.parts.attacks("test"),
            adaptive=self.config.adaptive,
            bits=self.manifest.bits,
            piece=self.config.piece,
            work=self.folder / "test",
        )
        do_pieces(
            spark, job, total=len(job.rows), unit="image", doing="attacked through the detectors"
        )
        return job.arrays()

    # --- what the driver makes of it ---

    def _result(
        self, detectors: tuple[Detector, ...], choice: Choice, calibration: Arrays, arrays: Arrays
    ) -> DetectResult:
        trials = self.parts.attacks("test").trials()
        scores = Scores(
            arrays=arrays,
            detectors=detectors,
            targets=choice.targets,
            trials=trials,
            adaptive=self.config.adaptive.attacks,
            calibration=choice.calibration,
            rate=self.config.fpr,
        )
        guard = self._keep_guard(detectors, choice, calibration)
        flagged = guard.suspicious(arrays["clean/scores"][:, choice.chosen])
        flags = detector_flags(
            arrays,
            detectors,
            choice.targets,
            trials,
            calibration=choice.calibration,
            validated=list(choice.auroc.values()),
        )
        single, chosen = detectors[choice.best_single], detectors[choice.chosen]
        keys = list(choice.auroc)
        return DetectResult(
            model=self.config.model,
            dataset_digest=self.manifest.digest,
            norm=self.config.norm,
            images=len(arrays["rows"]),
            detectors=tuple(scores.figures()),
            chosen=Chosen(
                name=chosen.name,
                layer=chosen.layer,
                auroc=choice.auroc[keys[choice.chosen]],
                best_single=f"{single.name} on {single.layer}",
            ),
            guard=str(self.guard_folder),
            action=self.config.guard,
            false_positives=false_positives(
                flagged,
                asked=self.config.fpr,
                patients=self.parts.of_images(read_patients, "test"),
                labels=arrays["labels"],
                classes=self.manifest.classes,
                sites=self.parts.of_images(read_sites, "test"),
            ),
            accuracy=float(arrays["clean/right"].mean()),
            accuracy_with_guard=float((arrays["clean/right"] & ~flagged).mean()),
            undetected_without_guard={
                eps_text(eps): float(scores.wrong_under(eps).mean()) for eps in self.config.eps
            },
            surrogates=surrogate_fidelity(arrays, choice.targets, detectors),
            rank_defence=tuple(rank_defence(arrays, trials)),
            believable=not any(flag.triggered for flag in flags),
            flags=tuple(flags),
            report=str(self.folder / "report" / "report.html"),
            mlflow={},
        )

    def _keep_guard(
        self, detectors: tuple[Detector, ...], choice: Choice, calibration: Arrays
    ) -> Guard:
        guard = Guard(
            detector=detectors[choice.chosen],
            calibration=choice.calibration[:, choice.chosen],
            false_positive_rate=self.config.fpr,
            action=self.config.guard,
        )
        save_guard(
            self.guard_folder,
            guard,
            features=features_of(calibration, "clean"),
            head=self.head,
            network=sha256_of(local_model(self.model) / WEIGHTS),
        )
        return guard

    def _served(self) -> ModelEntry:
        """Return the model with its guard, in one folder as it is served."""
        folder = self.folder / "served"
        copy_guarded(self.model, self.guard_folder, folder)
        card = (self.folder / "report" / "report.md").read_text("utf-8")
        return model_entry(folder, self.manifest, self.config.track, card=card)

    def _entry(self) -> RunEntry:
        return RunEntry(
            name=f"detect {Path(self.config.model).name}",
            config=self.config.model_dump(mode="json"),
            tags={"medspark.job": "detect"},
            dataset=DatasetEntry(
                name="test", digest=self.manifest.digest, source=str(self.config.shards)
            ),
        )

    def _facts(self, result: DetectResult) -> dict[str, str]:
        fit, adaptive = self.config.fit, self.config.adaptive
        return {
            "model": self.config.model,
            "shards": f"{self.config.shards}, digest {self.manifest.digest[:12]}",
            "images": f"{result.images} test images; AUROC and TPR count those that are right when "
            "clean and wrong under attack, against clean and noisy images",
            "fitted on": f"{len(self.parts.rows('reference'))} clean and "
            f"{len(self.parts.rows('contrast'))} other training images under "
            f"{', '.join(fit.attacks)}",
            "chosen by": f"{len(self.parts.rows('choosing'))} attacked validation images",
            "thresholds": f"split-conformal, from {len(self.parts.rows('calibration'))} clean "
            "validation images",
            "threat model": f"{self.config.norm}; eps is a fraction of [0, 1]; all images are "
            f"rounded to {2**self.manifest.bits} levels, as files are",
            "adaptive attacks": f"{', '.join(adaptive.attacks)} with {adaptive.steps} steps, "
            f"{adaptive.searches} weights; per image the worst of all attacks of this report",
            "seed": str(self.config.seed),
        }


def _classifier_folder(name: str, config: DetectConfig, manifest: Manifest) -> Path:
    """Return the folder of a network. Raises UsageError for another kind, or if it does not fit."""
    path = resolve_model(name, uri=config.track.uri)
    if path.suffix == ".onnx":
        raise UsageError(f"model: '{path}' is an ONNX file; a detector needs the network's folder.")
    if difference := read_card(path).misfit(manifest):
        raise UsageError(f"The model '{path}' does not fit: {difference}.")
    return path


def _beside(config: DetectConfig, model: Path) -> Path:
    """Return MODEL-guard beside the model's folder, or beside the detections if it is remote."""
    if config.model.startswith(("models:/", "runs:/")) or is_remote(config.model):
        return config.folder.with_name(f"{config.folder.name}-guard")
    real = model.resolve()
    return real.with_name(f"{real.name}-guard")


def _head(network: nn.Module, name: str) -> tuple[Tensor, Tensor] | None:
    if not name:
        return None
    layer = network.get_submodule(name)
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    zero = torch.zeros(len(weight)) if bias is None else bias
    assert isinstance(zero, Tensor)
    return weight.detach(), zero.detach()


def _decisive() -> set[str]:
    """Return the names of the settings that decide arrays, and not only what is made of them."""
    places = {"model", "shards", "surrogates", "folder", "guard_folder", "track"}
    return set(DetectConfig.model_fields) - places - {"guard", "fpr"}
