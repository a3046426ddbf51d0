"""One training step: ours (fused, the machine's best precision and layout) against the textbook's.

The textbook trains in float32, contiguous, with torch's default AdamW: plain, or with an attack
by ``loss.backward()`` and the sum of the clean and the attacked loss. Batch norm is frozen on
both sides, as our recipe has it. ART's AdversarialTrainer runs FGSM on half of each batch, as
its documentation shows it. Each side has a process of its own, ours set up as a rank is.
Denormal numbers count as zero on both sides: a network that sees the same batch again and again
has such gradients, and some steps of the textbook's DenseNet121 at 224 px then take ten times as
long.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from timing import Result, by_turns, in_a_process
from torch import Tensor, nn

from medspark.attacks.threat import ThreatModel
from medspark.data.batch import Batch
from medspark.memory import keep_freed_memory
from medspark.models.backbones import build
from medspark.models.classifier import Classifier, freeze_batch_norm
from medspark.models.config import ModelConfig
from medspark.train.config import TrainConfig
from medspark.train.engine import Engine
from medspark.train.objective import CrossEntropy
from medspark.train.world import World

if TYPE_CHECKING:  # ART is optional
    from art.defences.trainer import AdversarialTrainer

BATCH, EPS = 32, 2 / 255
NETWORKS = ("densenet121", "mobilenetv2_100", "resnet50")
SIDES = (64, 224)
CPU = torch.device("cpu")
TURNS = int(os.environ.get("MEDSPARK_BENCH_TURNS", "7"))
Make = Callable[[str, int], Callable[[], object]]


def network(name: str) -> Classifier:
    """Return a network for gray images, batch norm frozen."""
    torch.manual_seed(0)
    model = build(ModelConfig(name=name), num_classes=2, channels=1)
    freeze_batch_norm(model)
    return model.train()


def images(side: int, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    """Return the stored images of one batch, as the reader delivers them, and their labels."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(0, 256, (batch, side, side, 1), dtype=torch.uint8, generator=generator)
    return stored.permute(0, 3, 1, 2), torch.randint(0, 2, (batch,), generator=generator)


def as_floats(stored: Tensor) -> Tensor:
    """Return stored images as floats in [0, 1], contiguous.

    ``contiguous()`` leaves images of one channel the strides of channels-last, which then is the
    layout of the whole network.
    """
    return (stored.float() / 255).clone(memory_format=torch.contiguous_format)


def ours(
    name: str,
    side: int,
    config: TrainConfig | None = None,
    *,
    device: torch.device = CPU,
    batch: int = BATCH,
) -> Callable[[], object]:
    """Return our step, the conversion of stored integers included."""
    engine = engine_for(name, side, config, device=device)
    stored, labels = images(side, batch)
    return partial(engine.step, Batch(stored, labels, np.arange(batch), 1.0, batch, 0, 0), 0)


def engine_for(
    name: str, side: int, config: TrainConfig | None = None, *, device: torch.device = CPU
) -> Engine:
    """Return the engine of our step."""
    return Engine(
        network(name),
        config=config or TrainConfig(),
        threat=ThreatModel(eps=EPS),
        objective=CrossEntropy(),
        image_shape=(1, side, side),
        total_steps=10**6,
        seed=0,
        world=World(0, 0, 1, device),
    )


def as_a_rank(name: str, side: int, *, config: TrainConfig | None = None) -> Callable[[], object]:
    """Return our step in a process that is set up as the launch sets its ranks up."""
    keep_freed_memory()
    return ours(name, side, config)


def textbook(
    name: str, side: int, *, attack: bool, device: torch.device = CPU, batch: int = BATCH
) -> Callable[[], object]:
    """Return the step as tutorials write it."""
    model = network(name).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stored, labels = images(side, batch)
    x, labels = as_floats(stored).to(device), labels.to(device)

    def plain() -> None:
        optimiser.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimiser.step()

    return partial(adversarial_step, model, optimiser, x, labels) if attack else plain


def adversarial_step(
    model: nn.Module, optimiser: torch.optim.Optimizer, x: Tensor, labels: Tensor
) -> None:
    """Take the step of textbook adversarial training (Goodfellow et al. 2015)."""
    start = x.clone().requires_grad_(True)
    F.cross_entropy(model(start), labels).backward()
    assert start.grad is not None
    attacked = (x + EPS * start.grad.sign()).clamp(0, 1)
    optimiser.zero_grad()
    loss = F.cross_entropy(model(x), labels) + F.cross_entropy(model(attacked), labels)
    (loss / 2).backward()
    optimiser.step()


def art_trainer(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    shape: tuple[int, int, int],
    *,
    classes: int = 2,
    device: torch.device = CPU,
    batch: int = BATCH,
) -> AdversarialTrainer:
    """Return ART's AdversarialTrainer with FGSM, half of each batch attacked."""
    from art.attacks.evasion import FastGradientMethod
    from art.defences.trainer import AdversarialTrainer
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model=model,
        loss=nn.CrossEntropyLoss(),
        optimizer=optimiser,
        input_shape=shape,
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        device_type="cpu" if device.type == "cpu" else "gpu",
    )
    attack = FastGradientMethod(classifier, eps=EPS, batch_size=batch)
    return AdversarialTrainer(classifier, attacks=attack, ratio=0.5)


def art(
    name: str, side: int, *, device: torch.device = CPU, batch: int = BATCH
) -> Callable[[], object]:
    """Return ART's AdversarialTrainer on as many clean and attacked images as our step has."""
    model = network(name).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = art_trainer(model, optimiser, (1, side, side), device=device, batch=batch)
    stored, labels = images(side, batch)
    # It learns from one half of the images clean and from the other attacked: to learn from 32 of
    # each, as we do, it needs two batches of 32.
    x = np.concatenate([as_floats(stored).numpy()] * 2)
    y = np.eye(2, dtype=np.float32)[np.concatenate([labels.numpy()] * 2)]

    def one_pass() -> None:
        trainer.fit(x, y, batch_size=batch, nb_epochs=1)

    return one_pass


def _against(theirs: Make, name: str, side: int, goal: float) -> Result:
    with _apart(as_a_rank, name, side) as our_step, _apart(theirs, name, side) as their_step:
        samples = by_turns(our_step, their_step, turns=TURNS if side < 100 else -(-TURNS // 2))
    return Result(samples, goal, higher_is_better=False)


def _apart(make: Make, name: str, side: int) -> AbstractContextManager[Callable[[], object]]:
    return in_a_process(partial(_prepared, make, name, side))


def _prepared(make: Make, name: str, side: int) -> Callable[[], object]:
    torch.set_flush_denormal(True)  # before torch starts its threads, which inherit it
    return make(name, side)


def exact(name: str, side: int) -> Result:
    """Return what weights that do not depend on the number of processes cost, in one process."""
    ours_exact = partial(as_a_rank, config=TrainConfig(elastic="exact"))
    with _apart(ours_exact, name, side) as slower, _apart(as_a_rank, name, side) as plain:
        samples = by_turns(slower, plain, turns=TURNS)
    return Result(samples, 1.05, higher_is_better=False)


BENCHMARKS: dict[str, Callable[[], Result]] = {}
for _name in NETWORKS:
    for _side in SIDES:
        _row = f"{_name}/{_side}"
        BENCHMARKS[f"step_vs_plain/{_row}"] = partial(
            _against, partial(textbook, attack=False), _name, _side, 1.0
        )
        BENCHMARKS[f"step_vs_textbook_at/{_row}"] = partial(
            _against, partial(textbook, attack=True), _name, _side, 0.4
        )
        BENCHMARKS[f"exact_vs_ddp/{_row}"] = partial(exact, _name, _side)
        if importlib.util.find_spec("art") is not None:
            BENCHMARKS[f"step_vs_art/{_row}"] = partial(_against, art, _name, _side, 0.25)
