"""What is learnt in the same time: our default recipe, textbook FGSM training, ART's trainer.

    python tests/benchmarks/equal_time.py --shards SHARDS --weights mobilenetv2_100.safetensors

All three have the same time, threads, network, first weights, reader with its augmentation, batch
size, AdamW and peak rate. Batch norm is frozen for all of them where first weights are given:
moving statistics ruin FGSM training, and this is about time. The clock starts before a trainer is
set up. The one-cycle rate follows the clock, so that it has come down when the time is over,
whatever else the machine does. The weights of that moment are attacked with the test images,
outside the time. The steps of the textbook and of ART are those of ``step.py``.

Every (trainer, seed) that is done is a file in --folder; the same command does what is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step import BATCH, EPS, adversarial_step, art_trainer, as_floats

from medspark.attacks.threat import ThreatModel
from medspark.data.batch import Batch, Reader
from medspark.data.config import DataConfig
from medspark.data.prefetch import Prefetcher
from medspark.data.source import Source, open_source
from medspark.eps import eps_text, with_eps
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.robust import evaluate
from medspark.job import write_result
from medspark.models.backbones import build
from medspark.models.classifier import Classifier, freeze_batch_norm
from medspark.models.config import ModelConfig
from medspark.seeding import derive
from medspark.train.config import FitConfig
from medspark.train.engine import Engine
from medspark.train.kinds import with_recipe
from medspark.train.prepare import make_objective
from medspark.train.schedule import one_cycle
from medspark.train.validate import slices
from medspark.train.world import World

ALONE = World(0, 0, 1, torch.device("cpu"))
# The clock in the engine's terms: so many steps that a step of any length falls on one of them.
TICKS = 100_000
BUDGETS = (2, 4)


@dataclass(frozen=True)
class Setup:
    """What all trainers have in common."""

    network: str
    weights: str | None
    seconds: float
    images: int | None
    lr: float
    threads: int


@dataclass(frozen=True)
class Trainer:
    """Takes steps, each told what part of the time has passed, and gives the network in the end."""

    step: Callable[[Batch, float], object]
    network: Callable[[], Classifier]


def ours(model: Classifier, source: Source, setup: Setup, seed: int) -> Trainer:
    """Return medspark's default recipe."""
    recipe = our_recipe(setup.network, setup.weights, setup.lr)
    engine = Engine(
        model,
        config=recipe.train,
        threat=ThreatModel(eps=EPS),
        objective=make_objective(recipe, source, ALONE),
        image_shape=_shape(source),
        total_steps=TICKS,
        seed=seed,
        world=ALONE,
    )

    def network() -> Classifier:
        with engine.deployable() as kept:
            return kept

    return Trainer(lambda batch, passed: engine.step(batch, int(passed * TICKS)), network)


def our_recipe(network: str, weights: str | None, lr: float | None) -> FitConfig:
    """Return the default recipe of a network from these weights, at its own rate or at ``lr``."""
    model = ModelConfig(name=network, weights=weights)
    train = {"batch_size": BATCH} | ({} if lr is None else {"lr": lr})
    asked = {"shards": "unread", "run_dir": "unread", "model": model, "train": train}
    return with_recipe(FitConfig.model_validate(asked))


def textbook(model: Classifier, _source: Source, setup: Setup, _seed: int) -> Trainer:
    """Return FGSM training as tutorials write it."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=setup.lr)

    def step(batch: Batch, passed: float) -> None:
        _set_rate(optimiser, setup, passed)
        adversarial_step(model, optimiser, as_floats(batch.images), batch.labels)

    return Trainer(step, lambda: model)


def art(model: Classifier, source: Source, setup: Setup, seed: int) -> Trainer:
    """Return the Adversarial Robustness Toolbox's AdversarialTrainer."""
    np.random.seed(seed)  # it chooses the images to attack with it
    classes = len(source.manifest.classes)
    optimiser = torch.optim.AdamW(model.parameters(), lr=setup.lr)
    trainer = art_trainer(model, optimiser, _shape(source), classes=classes)

    def step(batch: Batch, passed: float) -> None:
        _set_rate(optimiser, setup, passed)
        x = as_floats(batch.images).numpy()
        y = np.eye(classes, dtype=np.float32)[batch.labels.numpy()]
        with redirect_stderr(io.StringIO()):  # it draws two bars for every batch
            trainer.fit(x, y, batch_size=len(x), nb_epochs=1)

    return Trainer(step, lambda: model)


TRAINERS = {"ours": ours, "textbook": textbook, "art": art}


def _shape(source: Source) -> tuple[int, int, int]:
    manifest = source.manifest
    return manifest.channels, manifest.height, manifest.width


def _set_rate(optimiser: torch.optim.Optimizer, setup: Setup, passed: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = one_cycle(int(passed * TICKS), TICKS, peak=setup.lr)


def first_network(setup: Setup, source: Source, seed: int) -> Classifier:
    """Return the network that every trainer starts from."""
    torch.manual_seed(derive(seed, "weights"))
    manifest = source.manifest
    config = ModelConfig(name=setup.network, weights=setup.weights)
    model = build(config, num_classes=len(manifest.classes), channels=manifest.channels)
    if setup.weights is not None:
        freeze_batch_norm(model)
    return model.train()


def forever(reader: Reader) -> Iterator[Batch]:
    """Yield the batches of one epoch after the other."""
    for epoch in itertools.count():
        with Prefetcher(reader.batches(epoch), depth=4) as ready:
            yield from ready


def do_cell(name: str, source: Source, setup: Setup, seed: int) -> dict[str, Any]:
    """Train with one trainer for the time, then attack what it has trained."""
    model = first_network(setup, source, seed)
    reader = source.training(global_batch=BATCH, seed=seed, rank=0, world=1)
    steps = images = 0
    with closing(forever(reader)) as batches:
        began = time.perf_counter()
        trainer = TRAINERS[name](model, source, setup, seed)
        for batch in batches:
            passed = (time.perf_counter() - began) / setup.seconds
            if passed >= 1:
                break
            trainer.step(batch, passed)
            steps, images = steps + 1, images + len(batch.labels)
        seconds = time.perf_counter() - began
    trained = {
        "steps": steps,
        "epochs": steps / reader.steps,
        "images_per_second": images / seconds,
    }
    return (
        {"trainer": name, "seed": seed, "seconds": seconds}
        | trained
        | _judged(trainer.network(), source, setup)
    )


def _judged(model: Classifier, source: Source, setup: Setup) -> dict[str, Any]:
    config = AttackSettings(eps=tuple(levels / 255 for levels in BUDGETS), images=setup.images)
    split = source.split("test")
    rows = config.rows(len(split))
    batches = slices(split, rows, batch_size=config.batch_size, world=ALONE)
    return evaluate(model, batches, config, probed_below=config.probed_below(rows)).as_json()


def figures(cell: Mapping[str, Any]) -> dict[str, float]:
    """Return what the table shows of one cell, by column."""
    found = {
        "steps": cell["steps"],
        "images/s": cell["images_per_second"],
        "clean AUROC": cell["clean"]["auroc"],
        "clean balanced accuracy": cell["clean"]["balanced_accuracy"],
    }
    for attack in cell["attacks"]:
        if attack["name"] == "pgd":
            title = f"PGD-{attack['steps']} {eps_text(attack['eps'])}"
            found[title] = attack["accuracy"]
            found[f"{title} balanced"] = attack["balanced_accuracy"]
    return found


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return mean ± standard deviation over the seeds as Markdown, one trainer a line."""
    by_trainer: dict[str, list[dict[str, float]]] = {}
    for cell in cells:
        by_trainer.setdefault(cell["trainer"], []).append(figures(cell))
    titles = list(figures(cells[0]))
    lines = [
        "| trainer | seeds | " + " | ".join(titles) + " |",
        "| --- |" + " ---: |" * (len(titles) + 1),
    ]
    for name, found in by_trainer.items():
        shown = [_spread([seed[title] for seed in found]) for title in titles]
        lines.append(f"| {name} | {len(found)} | " + " | ".join(shown) + " |")
    flagged = [
        f"⚠ {cell['trainer']}, seed {cell['seed']}: do not trust it, {flag['sentence']}"
        for cell in cells
        for flag in cell["flags"]
        if flag["triggered"]
    ]
    return "\n".join([*lines, "", *flagged])


def _spread(values: Sequence[float]) -> str:
    digits = 3 if max(values) <= 1 else 0
    text = f"{statistics.fmean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def demo() -> Path:
    """Return the shards of the built-in synthetic images, made by Spark if they are not there."""
    from medspark.spark.session import SparkConfig, spark_session
    from medspark.workflows.demo import DemoConfig, demo_shards

    with spark_session(SparkConfig(), name="medspark equal time") as spark:
        return demo_shards(spark, DemoConfig())[0]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=Path, help="synthetic images by default")
    parser.add_argument("--network", default="mobilenetv2_100", help="timm model name")
    parser.add_argument("--weights", help="first weights: a .safetensors file; random by default")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, for each")
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parser.add_argument("--trainers", default=",".join(TRAINERS), help="separated by commas")
    parser.add_argument("--images", type=int, help="test images that are attacked; all by default")
    parser.add_argument("--lr", type=float, help="peak of the rate, for all; default: ours")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("build/equal_time"), help="of cells")
    parser.add_argument("--output", type=Path, default=Path("build/equal_time.json"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Do the cells that are missing, and print and write the table after each."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    lr = our_recipe(args.network, args.weights, args.lr).train.lr
    setup = Setup(args.network, args.weights, args.seconds, args.images, lr, args.threads)
    source = open_source(args.shards or demo(), DataConfig())
    told = json.dumps([asdict(setup), source.manifest.digest], sort_keys=True)
    folder = args.folder / hashlib.sha256(told.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    cells: list[dict[str, Any]] = []
    for seed in map(int, args.seeds.split(",")):
        for name in args.trainers.split(","):
            kept = folder / f"{name}-{seed}.json"
            if not kept.exists():
                write_result(kept, do_cell(name, source, setup, seed))
            cells.append(with_eps(json.loads(kept.read_text(encoding="utf-8"))))
            document = {"setup": asdict(setup), "digest": source.manifest.digest, "cells": cells}
            write_result(args.output, document)
            print(table(cells), flush=True)


if __name__ == "__main__":
    main()
