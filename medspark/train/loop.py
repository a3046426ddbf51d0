"""From shards to a trained network: the loop over epochs, on one rank or on many."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from medspark.data.prefetch import Prefetcher
from medspark.data.source import Source, open_source
from medspark.errors import UsageError
from medspark.evaluate.calibrate import best_temperature
from medspark.evaluate.robust import RobustReport, evaluate
from medspark.models.checkpoint import (
    calibrate,
    describe,
    load_classifier,
    save_classifier,
)
from medspark.train.config import FitConfig, check_ranks
from medspark.train.engine import Engine
from medspark.train.meter import Meter, Recorder
from medspark.train.monitor import Monitor, look
from medspark.train.prepare import (
    make_lesson,
    make_network,
    make_objective,
    validation_split,
    watched_images,
)
from medspark.train.state import Checkpoints
from medspark.train.timeline import Timeline, peak_memory_mb
from medspark.train.validate import Validation, gatherer, slices, validate
from medspark.train.world import World

__all__ = ["fit"]

_LOGGER = logging.getLogger(__name__)

# Answered once, clean, and as many as there are: a temperature fitted to a few is worth little.
_CALIBRATION_IMAGES = 1024


def fit(config: FitConfig, world: World, journal: Recorder) -> dict[str, Any]:
    """Train as ``config`` says and return the result document of the run, the same on every rank.

    The chosen network is in ``run_dir/model``. Raises UsageError for input that cannot be used
    and RunError for training that diverged or was taken over by a later attempt.
    """
    timeline = Timeline()
    timeline.note("joined")
    check_ranks(config.train, world.size)
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
        self._model = make_network(config, source, world)
        self._engine = Engine(
            self._model,
            config=config.train,
            threat=config.attack,
            objective=make_objective(config, source, world),
            image_shape=(
                source.manifest.channels,
                source.manifest.height,
                source.manifest.width,
            ),
            total_steps=self._total,
            seed=config.seed,
            world=world,
            settle=config.train.batch_norm == "settle",
            lesson=make_lesson(config, source, world),
        )
        self._attacks = config.attacks
        self._checkpoints = Checkpoints(
            config.run_dir / "checkpoints", attempt=config.attempt, keep=config.checkpoint.keep
        )
        self._validation_split = validation_split(source)
        self._test_split = source.split("test")
        self._watched = watched_images(source, config, world)
        self._step = 0
        self._best: dict[str, Any] | None = None
        self._validations: list[dict[str, Any]] = []
        self._meter = Meter(world, journal)
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
        # After its last step an epoch is saved when it has been validated: a run that went on
        # from a checkpoint in between would never validate it.
        ended = self._step % self._reader.steps == 0
        if (self._asked_to_save() or late) and not ended:
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
            "config": self._config.digest(),
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
                "another run_dir, or --overwrite to begin again there."
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
        gather, probed_below = gatherer(self._world), config.probed_below(rows)
        return evaluate(model, batches, config, gather=gather, probed_below=probed_below)

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


def _masking(report: RobustReport) -> str:
    seen = "; ".join(flag.sentence for flag in report.flags if flag.triggered)
    return (
        "defensive distillation hides gradients and makes no network robust: figures under FGSM "
        f"and PGD are not to be believed. Seen here: {seen or 'no sign at these settings'}."
    )


def _flat(prefix: str, figures: Mapping[str, Any]) -> dict[str, float]:
    """Return nested figures under dotted-by-slash names; those that are undefined are left out."""
    flat: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            flat |= _flat(f"{prefix}/{name}", value)
        elif value is not None:
            flat[f"{prefix}/{name}"] = value
    return flat
