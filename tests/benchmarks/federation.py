"""A client of a federation: ours against a bare torch loop of FedAvg, in one process.

The settings are those in which simulators are compared: logistic regression on 28 x 28 images,
clients of 60 images, batches of 10; and a convolutional network with 4.7 M weights on 64 x 64
images, clients of 40 images, batches of 20. Both sides train one epoch of plain SGD and add the
weighted update to the round's sum. The bare loop checks nothing, keeps no order of images, and
its sum depends on the order of the clients: it is the least that FedAvg can cost with torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import array_shards
import numpy as np
import torch
import torch.nn.functional as F
from timing import Result, by_turns, in_a_process
from torch import Tensor, nn

from medspark.data.native import MappedSplit
from medspark.federate.aggregate.exact import ExactSum
from medspark.federate.client import Task, train_client
from medspark.federate.local import ClientPrecision, LocalConfig
from medspark.federate.weights import pack
from medspark.memory import keep_freed_memory
from medspark.shards.manifest import read_manifest
from medspark.train.config import AdversarialConfig

CLASSES, RATE = 10, 0.05


@dataclass(frozen=True)
class Setting:
    """A network for images of a ``side``, and clients of so many images."""

    side: int
    images: int
    batch: int
    network: Callable[[], nn.Module]

    def local(self, precision: ClientPrecision = "fp32") -> LocalConfig:
        """Return the clients' configuration: plain SGD, as in the bare loop."""
        return LocalConfig(
            precision=precision,
            train=AdversarialConfig(mode="standard"),
            batch_size=self.batch,
            optimiser="sgd",
            lr=RATE,
            schedule="constant",
            weight_decay=0,
            clip_grad=0,
        )

    def write(self, folder: Path, clients: int) -> Path:
        """Write shards that hold the images of so many clients, client after client."""
        draw = np.random.default_rng(0)
        labels = draw.integers(0, CLASSES, clients * self.images)
        labels[:CLASSES] = np.arange(CLASSES)
        pixels = draw.integers(0, 256, (len(labels), self.side, self.side, 1), dtype=np.uint8)
        return array_shards.write_arrays(folder, {"train": (pixels, labels)})

    def rows(self, client: int) -> np.ndarray:
        """Return the rows of a client."""
        return np.arange(client * self.images, (client + 1) * self.images)


def regression() -> nn.Module:
    """Return logistic regression on 28 x 28 images."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, CLASSES))


def convolutional() -> nn.Module:
    """Return the network of McMahan et al. 2017 for 64 x 64 images, 4.7 M weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 13 * 13, 430),
        nn.ReLU(),
        nn.Linear(430, CLASSES),
    )


SETTINGS = {
    "lr": Setting(side=28, images=60, batch=10, network=regression),
    "cnn": Setting(side=64, images=40, batch=20, network=convolutional),
}


def bare_round(
    model: nn.Module,
    start: Sequence[Tensor],
    pixels: Tensor,
    labels: Tensor,
    clients: Sequence[np.ndarray],
    batch: int,
) -> list[Tensor]:
    """Return the weights after a round of FedAvg, as a bare loop of torch computes them.

    ``pixels`` (N, H, W, 1) are bytes in memory; ``clients`` are the rows of each client. As
    (B, 1, H, W) their batches are channels-last, as ours are.
    """
    parameters = list(model.parameters())
    total = [torch.zeros_like(weight) for weight in start]
    everything = sum(len(rows) for rows in clients)
    for rows in clients:
        with torch.no_grad():
            for parameter, weight in zip(parameters, start, strict=True):
                parameter.copy_(weight)
        optimiser = torch.optim.SGD(parameters, lr=RATE)
        model.train()
        for chosen in torch.from_numpy(rows)[torch.randperm(len(rows))].split(batch):
            optimiser.zero_grad()
            taken = pixels[chosen].permute(0, 3, 1, 2).float() / 255
            F.cross_entropy(model(taken), labels[chosen]).backward()
            optimiser.step()
        with torch.no_grad():
            for part, parameter in zip(total, parameters, strict=True):
                part.add_(parameter, alpha=len(rows) / everything)
    return total


def bare(name: str, clients: int) -> Callable[[], object]:
    """Return a round of the bare loop over so many clients, in one thread."""
    torch.set_num_threads(1)
    keep_freed_memory()
    setting = SETTINGS[name]
    model = setting.network()
    start = [parameter.detach().clone() for parameter in model.parameters()]
    draw = torch.Generator().manual_seed(0)
    count = clients * setting.images
    shape = (count, setting.side, setting.side, 1)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, CLASSES, (count,), generator=draw)
    rows = [setting.rows(client) for client in range(clients)]
    return partial(bare_round, model, start, pixels, labels, rows, setting.batch)


def ours(name: str, clients: int) -> Callable[[], object]:
    """Return a round of our clients, trained one after the other, in one thread."""
    torch.set_num_threads(1)
    keep_freed_memory()
    setting = SETTINGS[name]
    folder = setting.write(Path(tempfile.mkdtemp()) / "shards", clients)
    split = MappedSplit(folder, read_manifest(folder), "train")
    model, config = setting.network(), setting.local()
    task = Task(pack(model, config.batch_norm))

    def one_round() -> None:
        total = ExactSum(len(task.weights), weight=clients * setting.images)
        for client in range(clients):
            answer = train_client(model, split.subset(setting.rows(client)), task, config)
            total.add_changes([answer.weights], task.weights, [answer.images])

    return one_round


def against_bare(name: str, clients: int, goal: float) -> Result:
    """Return the time of our clients over that of the bare loop's."""
    with (
        in_a_process(partial(ours, name, clients)) as our_round,
        in_a_process(partial(bare, name, clients)) as bare_one,
    ):
        samples = by_turns(our_round, bare_one, turns=9)
    return Result(samples, goal, higher_is_better=False)


BENCHMARKS = {
    "federated_client/lr": partial(against_bare, "lr", 100, 1.3),
    "federated_client/cnn": partial(against_bare, "cnn", 4, 1.1),
}
