"""From shards to a trained network: the loop over epochs, on one rank or on many."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from medspark.attacks.threat import ThreatModel
from medspark.config import Config
from medspark.data.batch import to_unit
from medspark.data.native import MappedSplit
from medspark.data.prefetch import Prefetcher
from medspark.data.source import DataConfig, Source, open_source
from medspark.errors import UsageError
from medspark.evaluate.calibrate import best_temperature
from medspark.evaluate.deploy import evaluation_copy
from medspark.evaluate.robust import EvaluateConfig, RobustReport, evaluate
from medspark.models.backbones import ModelConfig, build
from medspark.models.checkpoint import (
    calibrate,
    describe,
    load_classifier,
    read_card,
    save_classifier,
)
from medspark.models.classifier import Classifier, freeze_batch_norm
from medspark.seeding import derive
from medspark.shards.plan import permute
from medspark.train.adversarial import MODES, Learner, Sample, StepStats
from medspark.train.config import TrainConfig
from medspark.train.distill import DistillConfig, lesson
from medspark.train.engine import Engine, Report
from medspark.train.monitor import Monitor, look
from medspark.train.objective import (
    BinaryCrossEntropy,
    CrossEntropy,
    Objective,
    balanced_positive_weights,
    balanced_weights,
)
from medspark.train.state import CheckpointConfig, Checkpoints
from medspark.train.timeline import Timeline, peak_memory_mb
from medspark.train.validate import Validation, gatherer, slices, validate
from medspark.train.world import World

__all__ = ["FitConfig", "Recorder", "fit"]

_LOGGER = logging.getLogger(__name__)

# Answered once, clean, and as many as there are: a temperature fitted to a few is worth little.
_CALIBRATION_IMAGES = 1024


class FitConfig(Config):
    """Fine-tune one classifier on one dataset of shards."""

    shards: Path = Field(description="folder that jobs/shard.py wrote")
    run_dir: Path = Field(
        Path("build/runs/train"),
        description="folder for checkpoints and the model; all ranks see it",
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    attack: ThreatModel = ThreatModel()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    distill: DistillConfig | None = Field(
        None, description="a teacher to learn from, instead of train.mode"
    )
    seed: int = Field(0, ge=0, description="of the weights, the order of images and all noise")
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto goes on from the newest checkpoint in run_dir, if there is one"
    )
    attempt: int = Field(
        0, ge=0, description="number of this start of the run; a later one fences off earlier ones"
    )


class Recorder(Protocol):
    """Where metrics go; only rank 0's are kept."""

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep ``metrics`` of ``step``."""


def fit(config: FitConfig, world: World, journal: Recorder) -> dict[str, Any]:
    """Train as ``config`` says and return the result document of the run, the same on every rank.

    The chosen network is in ``run_dir/model``. Raises UsageError for input that cannot be used
    and RunError for training that diverged or was taken over by a later attempt.
    """
    timeline = Timeline()
    timeline.note("joined")
    source = open_source(config.shards, config.data, seed=config.seed)
    timeline.note("opened")
    run = _Run(config, world, journal, source, timeline)
    timeline.note("built")
    run.train()
    timeline.note("trained")
    report = run.test()
    timeline.note("tested")
    return run.result(report)


class _Run:
    """One training from its first or its resumed step to its last."""

    def __init__(
        self,
        config: FitConfig,
        world: World,
        journal: Recorder,
        source: Source,
        timeline: Timeline,
    ) -> None:
        self._config = config
        self._timeline = timeline
        self._world = world
        self._journal = journal
        self._source = source
        self._reader = source.training(
            global_batch=config.train.batch_size,
            seed=config.seed,
            rank=world.rank,
            world=world.size,
        )
        self._total = config.train.epochs * self._reader.steps
        self._model = _network(config, source, world)
        self._engine = Engine(
            self._model,
            config=config.train,
            threat=config.attack,
            objective=_objective(config, source, world),
            image_shape=(
                source.manifest.channels,
                source.manifest.height,
                source.manifest.width,
            ),
            total_steps=self._total,
            seed=config.seed,
            world=world,
            settle=config.train.batch_norm == "settle",
            lesson=_lesson(config, source, world),
        )
        self._attacks = _attacks(config)
        self._checkpoints = Checkpoints(
            config.run_dir / "checkpoints", attempt=config.attempt, keep=config.checkpoint.keep
        )
        self._validation_split = _validation_split(source)
        self._test_split = source.split("test")
        self._watched = _watched(source, config, world)
        self._step = 0
        self._best: dict[str, Any] | None = None
        self._validations: list[dict[str, Any]] = []
        self._meter = _Meter(world, journal)
        self._saved_at = time.monotonic()
        self._monitor = Monitor(config.train.monitor)
        self._alarms: list[dict[str, Any]] = []

    def train(self) -> None:
        """Train all epochs, or those that are left."""
        self._resume()
        for epoch in range(self._step // self._reader.steps, self._config.train.epochs):
            if self._stopped():
                break
            start = self._step - epoch * self._reader.steps
            batches = self._reader.batches(epoch, start=start)
            self._meter.begin()
            with Prefetcher(batches, depth=self._config.data.prefetch) as ready:
                for batch in ready:
                    self._meter.add(self._engine.step(batch, self._step))
                    self._timeline.note("stepped")
                    self._step += 1
                    if self._reports():
                        self._report(epoch, ready.waited)
                self._finish_epoch(epoch, ready.waited)

    def _finish_epoch(self, epoch: int, waited: float) -> None:
        self._meter.publish(self._step, epoch, waited=waited)
        self._engine.average_buffers()
        found = self._validate()
        score = found.score(robust=self._attacks)
        figures = {
            "epoch": epoch + 1,
            "score": score,
            "clean": found.clean.model_dump(),
            "pgd": found.attacked.model_dump(),
        }
        self._validations.append(figures)
        self._journal.record(self._step, _flat("val", figures))
        if self._world.is_main:
            _LOGGER.info("epoch %d of %d: %s", epoch + 1, self._config.train.epochs, found)
        if self._best is None or score > self._best["score"]:
            self._best = figures
            self._keep_model()
        self._watch(epoch)
        self._save()

    def _watch(self, epoch: int) -> None:
        """Look for overfitting to FGSM and label leaking, and act on it."""
        config = self._config.train.monitor
        if config.action == "off" or not self._attacks:
            return
        images, labels = self._watched
        with self._engine.deployable() as model:
            threat = self._config.attack
            sight = look(model, images, labels, threat=threat, steps=config.steps)
        self._journal.record(self._step, _flat("monitor", asdict(sight)))
        clean, attacked = self._meter.take_accuracies()
        alarm = self._monitor.judge(sight, clean=clean, attacked=attacked)
        if alarm is None:
            return
        self._alarms.append(asdict(alarm) | {"epoch": epoch + 1, "action": config.action})
        _LOGGER.warning("%s after epoch %d: %s", alarm.cause, epoch + 1, alarm.sentence)
        if config.action == "noise":
            self._engine.noise = max(2 * self._engine.noise, 1.0)

    def _stopped(self) -> bool:
        return any(alarm["action"] == "restore" for alarm in self._alarms)

    def _reports(self) -> bool:
        config = self._config
        return self._step % config.train.log_every == 0 or self._asked_to_save()

    def _asked_to_save(self) -> bool:
        every = self._config.checkpoint.every_steps
        return every > 0 and self._step % every == 0

    def _report(self, epoch: int, waited: float) -> None:
        self._meter.publish(self._step, epoch, waited=waited)
        # Moving batch-norm statistics are averaged at fixed steps, whether or not a checkpoint is
        # due, so that a resumed run takes the same average as the unbroken one.
        self._engine.average_buffers()
        minutes = self._config.checkpoint.every_minutes
        late = 0 < 60 * minutes <= time.monotonic() - self._saved_at
        if self._asked_to_save() or late:
            self._save()

    def _validate(self) -> Validation:
        with self._engine.deployable() as model:
            return validate(
                model,
                self._validation_split,
                threat=self._config.attack,
                images=self._config.train.validation_images,
                steps=self._config.train.validation_steps,
                seed=self._config.seed,
                world=self._world,
            )

    def _keep_model(self) -> None:
        if not self._world.is_main:
            return
        manifest = self._source.manifest
        with self._engine.deployable() as model:
            card = describe(
                model,
                classes=manifest.classes,
                multi_label=manifest.multi_label,
                height=manifest.height,
                width=manifest.width,
                bits=manifest.bits,
                dropout=self._config.model.dropout,
                rendering=manifest.source.get("rendering"),
            )
            save_classifier(self._config.run_dir / "model", model, card)

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        if not self._world.is_main:
            return
        record = {
            "fingerprint": self._fingerprint(),
            "best": self._best,
            "validations": self._validations,
            "alarms": self._alarms,
            "noise": self._engine.noise,
            "watched_best": self._monitor.best,
            "seconds": self._meter.seconds,
        }
        self._checkpoints.save(self._step, self._engine.tensors(), record)

    def _resume(self) -> None:
        if self._world.is_main:
            self._checkpoints.claim()
            if self._config.resume == "never":
                self._checkpoints.clear()
        self._world.barrier()
        saved = self._checkpoints.latest()
        steps = self._world.gather(saved.record["step"] if saved else 0)
        if len(set(steps)) > 1:
            raise UsageError(
                f"The ranks find different checkpoints in {self._config.run_dir} (steps {steps}): "
                "run_dir has to be a folder that all of them share."
            )
        if saved is None:
            return
        self._check_fingerprint(saved.record["fingerprint"])
        self._engine.restore(saved.tensors)
        self._step = saved.record["step"]
        self._best, self._validations = saved.record["best"], saved.record["validations"]
        self._alarms, self._engine.noise = saved.record["alarms"], saved.record["noise"]
        self._monitor.best = saved.record["watched_best"]
        _LOGGER.info("going on from the checkpoint after step %d", self._step)

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "dataset": self._source.manifest.digest,
            "config": _digest(self._config),
            "precision": self._engine.precision,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "world": self._world.size,
        }

    def _check_fingerprint(self, theirs: dict[str, Any]) -> None:
        mine = self._fingerprint()
        differing = [key for key in mine if mine[key] != theirs.get(key)]
        if "dataset" in differing or "config" in differing:
            raise UsageError(
                f"{self._config.run_dir} holds a run of other data or another configuration; give "
                "another run_dir, or --resume never to start again there."
            )
        if differing:
            _LOGGER.warning(
                "going on with another %s: the same images in the same steps, but weights may "
                "differ in the last bits from those of an unbroken run",
                ", ".join(differing),
            )

    def test(self) -> RobustReport:
        """Calibrate the chosen network, then attack it with the test images."""
        if self._world.is_main:
            self._calibrate()
        self._world.barrier()
        model = load_classifier(self._config.run_dir / "model").to(self._world.device)
        config = self._config.evaluate
        rows = config.rows(len(self._test_split))
        batches = slices(self._test_split, rows, batch_size=config.batch_size, world=self._world)
        return evaluate(model, batches, config, gather=gatherer(self._world))

    def _calibrate(self) -> None:
        folder, alone = self._config.run_dir / "model", World(0, 0, 1, self._world.device)
        model = load_classifier(folder).to(self._world.device)
        rows = np.arange(min(_CALIBRATION_IMAGES, len(self._validation_split)))
        size = self._config.evaluate.batch_size
        seen = slices(self._validation_split, rows, batch_size=size, world=alone)
        with torch.inference_mode():
            answers = [(model(images), labels) for images, labels, _ in seen]
        logits, labels = (torch.cat(parts) for parts in zip(*answers, strict=True))
        calibrate(folder, best_temperature(logits, labels))

    def result(self, report: RobustReport) -> dict[str, Any]:
        """Return what the job reports."""
        config = self._config
        hides = config.distill is not None and config.distill.method == "defensive"
        warning = {"warning": _masking(report)} if hides else {}
        return warning | {
            "mode": config.distill.method if config.distill else config.train.mode,
            **report.as_json(),
            "validation": self._best,
            "epochs": config.train.epochs,
            "alarms": self._alarms,
            "steps": self._step,
            "model": str(config.run_dir / "model"),
            "architecture": self._model.architecture,
            "batch_norm": "frozen" if self._model.batch_norm_frozen else "train",
            "precision": self._engine.precision,
            "world_size": self._world.size,
            "threads_per_rank": torch.get_num_threads(),
            "global_batch": config.train.batch_size,
            "images_per_second": self._meter.images_per_second,
            "data_wait_share": self._meter.wait_share,
            "communication_share": self._meter.share_of_step(self._engine.exposed_seconds()),
            "peak_memory_mb": max(self._world.gather(peak_memory_mb())),
            "timeline": self._timeline.moments,
            "train_images": len(self._source.split("train")),
            "dataset_digest": self._source.manifest.digest,
        }


class _Meter:
    """Adds up what the ranks report and hands it to the journal, a few steps at a time.

    Reports stay on the device until then, and the ranks' are summed in one go: a step pays for
    no collective but that of its gradients.
    """

    def __init__(self, world: World, journal: Recorder) -> None:
        self._world = world
        self._journal = journal
        self._reports: list[Report] = []
        self._waited_before = 0.0
        self._window_began = time.perf_counter()
        self._right = torch.zeros(3)
        self.images = self.steps = 0
        self.seconds = 0.0
        self.waited = 0.0

    def begin(self) -> None:
        """Start the clock; what came before, such as a validation, is not training."""
        self._window_began = time.perf_counter()
        self._waited_before = 0.0

    def take_accuracies(self) -> tuple[float, float]:
        """Return the accuracies on clean and on attacked training images since the last call."""
        clean, attacked, images = self._right.tolist()
        self._right = torch.zeros(3)
        return clean / max(images, 1), attacked / max(images, 1)

    def add(self, report: Report) -> None:
        """Take the report of one step."""
        self._reports.append(report)

    def publish(self, step: int, epoch: int, *, waited: float = 0.0) -> None:
        """Record the steps since the last time; ``step`` is how many have been taken in all."""
        if not self._reports:
            return
        # Reading the figures waits for the device: it belongs to the time of the window.
        figures = self._world.sum(torch.stack([report.figures for report in self._reports])).cpu()
        now = time.perf_counter()
        seconds, wait = now - self._window_began, waited - self._waited_before
        images = int(figures[:, 3].sum())
        self._right += figures[:, 1:].sum(0)
        self.images, self.seconds = self.images + images, self.seconds + seconds
        self.steps += len(self._reports)
        self.waited += wait
        speed = {"images_per_second": images / seconds, "data_wait_share": wait / seconds}
        first = step - len(self._reports) + 1
        for offset, (report, row) in enumerate(zip(self._reports, figures.tolist(), strict=True)):
            last = first + offset == step
            metrics = _step_metrics(report, row) | {"epoch": epoch}
            self._journal.record(first + offset, metrics | (speed if last else {}))
        self._reports = []
        self._window_began, self._waited_before = now, waited

    @property
    def images_per_second(self) -> float:
        """Images that all ranks trained on per second of training."""
        return self.images / self.seconds if self.seconds else 0.0

    def share_of_step(self, seconds: float) -> float:
        """Return ``seconds`` as a share of what a step took."""
        return seconds * self.steps / self.seconds if self.seconds else 0.0

    @property
    def wait_share(self) -> float:
        """Share of this rank's training time that it waited for data."""
        return self.waited / self.seconds if self.seconds else 0.0


def _step_metrics(report: Report, figures: list[float]) -> dict[str, float]:
    loss, clean, attacked, images = figures
    return {
        "loss": loss,
        "train/clean_accuracy": clean / images,
        "train/attacked_accuracy": attacked / images,
        "lr": report.rate,
        "eps_255": report.eps * 255,
        "gradient_norm": report.gradient_norm,
    }


def _attacks(config: FitConfig) -> bool:
    """Return whether training learns from attacked images."""
    return MODES[config.train.mode].attacks if config.distill is None else config.distill.robust


def _check_dual(config: FitConfig, *, frozen: bool) -> None:
    mixed = ("naive", "fused", "fused_noise", "trades")
    if config.train.dual_bn and (frozen or config.distill or config.train.mode not in mixed):
        raise UsageError(
            f"train.dual_bn needs one of the modes {', '.join(mixed)}, which learn from clean and "
            "attacked images, and batch norm that is not frozen."
        )


def _network(config: FitConfig, source: Source, world: World) -> Classifier:
    manifest = source.manifest
    torch.manual_seed(derive(config.seed, "weights"))
    model = build(config.model, num_classes=len(manifest.classes), channels=manifest.channels)
    given = config.model.weights is not None and not config.train.dual_bn
    frozen = config.train.batch_norm == "frozen" or (
        config.train.batch_norm == "auto" and given and _attacks(config)
    )
    _check_dual(config, frozen=frozen)
    if frozen:
        freeze_batch_norm(model)
    elif config.train.sync_batch_norm:
        if world.device.type != "cuda":
            raise UsageError("train.sync_batch_norm works between GPUs only.")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return model


def _validation_split(source: Source) -> MappedSplit:
    held_out = source.manifest.splits.get("val")
    if held_out is None or held_out.rows == 0:
        _LOGGER.warning("there is no validation split: epochs are compared on training images")
        return source.split("train")
    return source.split("val")


def _masking(report: RobustReport) -> str:
    seen = "; ".join(flag.sentence for flag in report.flags if flag.triggered)
    return (
        "defensive distillation hides gradients and makes no network robust: figures under FGSM "
        f"and PGD are not to be believed. Seen here: {seen or 'no sign at these settings'}."
    )


def _lesson(
    config: FitConfig, source: Source, world: World
) -> Callable[[Learner, Sample], StepStats] | None:
    if config.distill is None:
        return None
    card = read_card(config.distill.teacher)
    manifest = source.manifest
    if difference := card.misfit(manifest):
        raise UsageError(f"The teacher in {config.distill.teacher} does not fit: {difference}.")
    shape = (2, manifest.channels, manifest.height, manifest.width)
    teacher = load_classifier(config.distill.teacher).to(world.device)
    return lesson(config.distill, evaluation_copy(teacher, torch.rand(shape, device=world.device)))


def _watched(source: Source, config: FitConfig, world: World) -> tuple[Tensor, Tensor]:
    """Return the fixed training images that the monitor attacks, and their labels."""
    split = source.split("train")
    count = min(config.train.monitor.images, len(split))
    rows = permute(np.arange(count), len(split), derive(config.seed, "monitor"))
    images, labels = split.gather(rows)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    return to_unit(pixels, world.device), torch.from_numpy(labels).to(world.device)


def _objective(config: FitConfig, source: Source, world: World) -> Objective:
    """Return the loss that these labels are learnt by."""
    several, weights = source.manifest.multi_label, None
    if config.train.class_weights == "balanced":
        labels = source.split("train").labels
        if several:
            weights = balanced_positive_weights(labels.sum(0).tolist(), len(labels))
        else:
            counts = np.bincount(labels, minlength=len(source.manifest.classes))
            weights = balanced_weights(counts.tolist())
        weights = weights.to(world.device)
    loss = BinaryCrossEntropy if several else CrossEntropy
    return loss(weights, config.train.label_smoothing, config.train.temperature)


def _digest(config: FitConfig) -> str:
    """Return a hash of what decides the weights; paths, attempts and reports do not."""
    decisive = config.model_dump(
        mode="json", include={"attack", "train", "model", "seed", "distill"}
    )
    decisive["data"] = config.data.model_dump(
        mode="json", include={"reader", "augment", "window", "share"}
    )
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _flat(prefix: str, figures: Mapping[str, Any]) -> dict[str, float]:
    """Return nested figures under dotted-by-slash names; those that are undefined are left out."""
    flat: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            flat |= _flat(f"{prefix}/{name}", value)
        elif value is not None:
            flat[f"{prefix}/{name}"] = value
    return flat
