"""Run a training from its first or resumed step to its result document."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch

from medspark.data.batch import Batch, pinned
from medspark.data.prefetch import Prefetcher
from medspark.data.source import open_source
from medspark.evaluate.noise_result import NoiseResult
from medspark.evaluate.result import RobustnessResult
from medspark.models.card import read_card
from medspark.models.checkpoint import describe, save_classifier
from medspark.train.combinations import check_combinations
from medspark.train.config import FitConfig, check_ranks
from medspark.train.engine import Engine
from medspark.train.final_test import calibrate_and_test, judge_with_noise
from medspark.train.kinds import recipe_line, with_recipe
from medspark.train.meter import Meter, Recorder
from medspark.train.monitor import Monitor, attack_watched
from medspark.train.prepare import Recipe, make_objective, make_pruning, watched_images
from medspark.train.prune.figures import pruning_figures
from medspark.train.result import ValidationResult
from medspark.train.resume import Progress, Resumption
from medspark.train.run_setup import RunSetup, set_up
from medspark.train.timeline import Timeline, peak_memory_mb
from medspark.train.validate import validate
from medspark.train.world import World

__all__ = ["fit", "trained"]

_LOGGER = logging.getLogger(__name__)


def fit(config: FitConfig, world: World, journal: Recorder) -> dict[str, Any]:
    """Train as ``config`` says and return the result document of the run, the same on every rank.

    The best network is saved to ``run_dir/model``. Raises UsageError for unusable input, and
    RunError if training diverges or a later attempt takes the run over.
    """
    if world.is_main and (line := recipe_line(config)):
        _LOGGER.info("%s", line)
    return trained(with_recipe(config), world, journal, Recipe())[0]


def trained(
    config: FitConfig, world: World, journal: Recorder, recipe: Recipe
) -> tuple[dict[str, Any], RunSetup]:
    """Do as ``fit``, by ``recipe``; return the setup of the run as well."""
    timeline = Timeline()
    timeline.note("joined")
    check_ranks(config.train, world.size)
    source = open_source(config.shards, config.data, seed=config.seed)
    timeline.note("opened")
    config.decision.check(source.manifest)
    check_combinations(config, multi_label=source.manifest.multi_label)
    setup = set_up(config, world, journal, source, timeline)
    training = _Training(setup, recipe)
    timeline.note("built")
    training.run()
    timeline.note("trained")
    tested = calibrate_and_test(setup)
    noise = judge_with_noise(setup)
    timeline.note("tested")
    return _result(setup, training, tested) | _pruned(setup, noise), setup


def _build_engine(setup: RunSetup, recipe: Recipe, *, steps: int) -> Engine:
    config, manifest = setup.config, setup.source.manifest
    return Engine(
        recipe.network(config, setup.source, setup.world),
        config=config.train,
        threat=config.attack,
        objective=make_objective(config, setup.source, setup.world),
        image_shape=(manifest.channels, manifest.height, manifest.width),
        total_steps=steps,
        seed=config.seed,
        world=setup.world,
        settle=config.train.batch_norm == "settle",
        step_rule=recipe.step_rule(config, setup.source, setup.world),
        pruner=recipe.pruner(config),
    )


class _Training:
    """The epochs of one run: steps, validation, monitor and checkpoints."""

    def __init__(self, setup: RunSetup, recipe: Recipe) -> None:
        config, world = setup.config, setup.world
        self._setup, self._recipe = setup, recipe
        self._reader = setup.source.training(
            global_batch=config.train.batch_size,
            seed=config.seed,
            rank=world.rank,
            world=world.size,
            cutmix=config.train.cutmix,
        )
        self._steps = config.total_steps(self._reader.steps)
        self.epochs = -(-self._steps // self._reader.steps)  # the last one can be a part of one
        self.engine = _build_engine(setup, recipe, steps=self._steps)
        self.progress = Progress()
        self.meter = Meter(world, setup.journal)
        self._monitor = Monitor(config.train.monitor)
        self._watched = watched_images(setup.source, config, world)
        self._resumption = Resumption(setup, self.engine, self.progress, self._monitor)

    def run(self) -> None:
        """Train the remaining epochs."""
        self._resumption.resume()
        while self.progress.step < self._steps and not self.progress.stopped:
            epoch = self.progress.step // self._reader.steps
            waited = self._take_steps(epoch)
            self._finish_epoch(epoch, waited)

    def _take_steps(self, epoch: int) -> float:
        """Take the remaining steps of ``epoch``; return the seconds spent waiting for images."""
        start = self.progress.step - epoch * self._reader.steps
        left = self._steps - self.progress.step
        batches: Iterator[Batch] = islice(self._reader.batches(epoch, start=start), left)
        if self._setup.world.device.type == "cuda":
            batches = map(pinned, batches)
        self.meter.begin()
        with Prefetcher(batches, depth=self._setup.config.data.prefetch) as ready:
            for batch in ready:
                self.meter.add(self.engine.step(batch, self.progress.step))
                self._setup.timeline.note("stepped")
                self.progress.step += 1
                if self._reports():
                    self._report(epoch, ready.waited)
            return ready.waited

    def _reports(self) -> bool:
        log_every = self._setup.config.train.log_every
        return self.progress.step % log_every == 0 or self._resumption.asked

    def _report(self, epoch: int, waited: float) -> None:
        self.meter.publish(self.progress.step, epoch, waited=waited)
        self.engine.check()
        # Moving batch-norm statistics are averaged at fixed steps, whether or not a checkpoint is
        # due, so that a resumed run averages as often as an unbroken one.
        self.engine.average_buffers()
        # The last step of an epoch is saved after validation: a run that resumed from a checkpoint
        # in between would never validate the epoch.
        ended = self.progress.step % self._reader.steps == 0 or self.progress.step == self._steps
        if self._resumption.due and not ended:
            self._resumption.save(seconds=self.meter.seconds)

    def _finish_epoch(self, epoch: int, waited: float) -> None:
        progress = self.progress
        self.meter.publish(progress.step, epoch, waited=waited)
        self.engine.check()
        self.engine.average_buffers()
        validation = self._validate(epoch)
        progress.validations.append(validation)
        self._setup.journal.record(progress.step, validation.metrics())
        if self._setup.world.is_main:
            _LOGGER.info("epoch %d of %d: %s", epoch + 1, self.epochs, validation)
        best = progress.best
        better = (
            not self._recipe.chooses
            or best is None
            or validation.better_than(best, robust=self._setup.config.attacks)
        )
        if better and self.engine.complete:
            progress.best = validation
            self._keep_model()
        self._watch(epoch)
        self._resumption.save(seconds=self.meter.seconds)

    def _watch(self, epoch: int) -> None:
        """Check for overfitting to FGSM and label leaking, and react as configured."""
        config = self._setup.config.train.monitor
        if config.action == "off" or not self._setup.config.attacks:
            return
        images, labels = self._watched
        with self.engine.deployable() as model:
            threat = self._setup.config.attack
            watched = attack_watched(model, images, labels, threat=threat, steps=config.steps)
        accuracies = {f"monitor/{name}": value for name, value in asdict(watched).items()}
        self._setup.journal.record(self.progress.step, accuracies)
        clean, attacked = self.meter.take_accuracies()
        alarm = self._monitor.judge(watched, clean=clean, attacked=attacked)
        if alarm is None:
            return
        record = asdict(alarm) | {"epoch": epoch + 1, "action": config.action}
        self.progress.alarms.append(record)
        _LOGGER.warning("%s after epoch %d: %s", alarm.cause, epoch + 1, alarm.sentence)
        if config.action == "noise":
            self.engine.noise = max(2 * self.engine.noise, 1.0)

    def _validate(self, epoch: int) -> ValidationResult:
        config = self._setup.config
        with self.engine.deployable() as model:
            clean, attacked = validate(
                model,
                self._setup.validation,
                threat=config.attack,
                images=config.train.validation_images,
                steps=config.train.validation_steps,
                seed=config.seed,
                world=self._setup.world,
            )
        return ValidationResult.of(epoch + 1, clean, attacked, robust=self._setup.config.attacks)

    def _keep_model(self) -> None:
        if not self._setup.world.is_main:
            return
        manifest = self._setup.source.manifest
        with self.engine.deployable() as model:
            card = describe(
                model,
                classes=manifest.classes,
                multi_label=manifest.multi_label,
                height=manifest.height,
                width=manifest.width,
                bits=manifest.bits,
                dropout=self._setup.config.model.dropout,
                rendering=manifest.source.get("rendering"),
                pruning=make_pruning(self._setup.config),
            )
            save_classifier(self._setup.model_folder, model, card, noise=self.engine.noise_scales())


def _result(setup: RunSetup, training: _Training, tested: RobustnessResult) -> dict[str, Any]:
    """Return the result document."""
    config, world = setup.config, setup.world
    engine, progress, meter = training.engine, training.progress, training.meter
    hides = config.distill is not None and config.distill.method == "defensive"
    warning = {"warning": _masking(tested)} if hides else {}
    return warning | {
        "mode": config.mode,
        **tested.as_json(),
        "validation": progress.best and progress.best.as_json(),
        "epochs": training.epochs,
        "alarms": progress.alarms,
        "steps": progress.step,
        **_decision(setup),
        "model": str(setup.model_folder),
        "architecture": engine.model.architecture,
        "batch_norm": "frozen" if engine.model.batch_norm_frozen else "train",
        "precision": engine.precision,
        "world_size": world.size,
        "threads_per_rank": torch.get_num_threads(),
        "global_batch": config.train.batch_size,
        "images_per_second": meter.images_per_second,
        "seconds_per_step": meter.seconds_per_step,
        "data_wait_share": meter.wait_share,
        "communication_share": meter.share_of_step(engine.exposed_seconds()),
        "peak_memory_mb": max(world.gather(peak_memory_mb())),
        "timeline": setup.timeline.moments,
        "train_images": len(setup.source.split("train")),
        "dataset_digest": setup.source.manifest.digest,
    }


def _decision(setup: RunSetup) -> dict[str, Any]:
    decision = read_card(setup.model_folder).decision
    return {} if decision is None else {"decision": decision.model_dump(mode="json")}


def _pruned(setup: RunSetup, noise: NoiseResult | None) -> dict[str, Any]:
    """Return the part of the result document on the pruning; nothing for other networks."""
    card = read_card(setup.model_folder)
    if card.pruning is None or card.denoiser is not None:
        return {}
    figures = pruning_figures(setup.model_folder)
    return figures if noise is None else figures | {"noise": noise.as_json()}


def _masking(tested: RobustnessResult) -> str:
    seen = "; ".join(flag.sentence for flag in tested.triggered_flags)
    return (
        "defensive distillation hides gradients and does not make a network robust: do not trust "
        f"results under FGSM and PGD. Signs in this run: {seen or 'none at these settings'}."
    )
