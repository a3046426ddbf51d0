"""Rounds of FedAvg in Flower's simulation (Ray, one CPU a client), for comparisons with ours.

This needs an environment of its own, with flwr[simulation] 1.41, torch, pyarrow and what
medspark.config needs: Flower does not install beside the tested set. As a script it prints the
seconds of each round:

    PYTHONPATH=.:tests/benchmarks:tests/shards python tests/federate/flower_rounds.py lr 1000 10 6
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from federation import CLASSES, RATE, SETTINGS
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor, nn

from medspark.shards.plan import EpochPlan


@dataclass(frozen=True)
class Job:
    """What the clients train: a network, images in a folder, and each client's first row.

    With ``seed`` they read their images in our order, otherwise in one of torch's.
    """

    setting: str
    folder: str
    bounds: tuple[int, ...]
    seed: int | None = None
    rate: float = RATE


@cache
def network(setting: str) -> nn.Module:
    """Return the network of this process."""
    torch.set_num_threads(1)
    return SETTINGS[setting].network()


@cache
def images(folder: str) -> tuple[Tensor, Tensor]:
    """Return the images (N, H, W, 1) and labels of all clients, as this process maps them."""
    pixels = np.load(Path(folder) / "pixels.npy", mmap_mode="c")
    return torch.from_numpy(pixels), torch.from_numpy(np.load(Path(folder) / "labels.npy"))


def train(job: Job, message: Message, context: Context) -> Message:
    """Train one epoch, as Flower's tutorials do."""
    model, setting = network(job.setting), SETTINGS[job.setting]
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    client, round = (
        int(context.node_config["partition-id"]),
        message.content["config"]["server-round"],
    )
    first, last = job.bounds[client : client + 2]
    pixels, labels = images(job.folder)
    optimiser = torch.optim.SGD(model.parameters(), lr=job.rate)
    model.train()
    for rows in order(last - first, setting.batch, job.seed, int(round) - 1):
        chosen = first + rows
        optimiser.zero_grad()
        # As (B, 1, H, W) these are channels-last, as ours are: torch's faster kernels for them.
        taken = pixels[chosen].permute(0, 3, 1, 2).float() / 255
        F.cross_entropy(model(taken), labels[chosen]).backward()
        optimiser.step()
    content = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": last - first}),
    }
    return Message(content=RecordDict(content), reply_to=message)


def order(rows: int, batch: int, seed: int | None, epoch: int) -> Iterator[Tensor]:
    """Yield the rows of each step."""
    if seed is None:
        yield from torch.randperm(rows).split(batch)
    else:
        for planned in EpochPlan(rows, batch, seed, epoch).rank_batches(0, 1):
            yield torch.from_numpy(planned)


def simulate(
    job: Job, start: dict[str, Tensor], *, per_round: int, rounds: int
) -> tuple[dict[str, Tensor], list[float]]:
    """Return the weights after so many rounds, and the seconds of each round."""
    client, server = ClientApp(), ServerApp()
    client.train()(lambda message, context: train(job, message, context))
    clients = len(job.bounds) - 1
    strategy = FedAvg(
        fraction_train=per_round / clients,
        fraction_evaluate=0.0,
        min_train_nodes=per_round,
        min_available_nodes=clients,
    )
    times: list[float] = []
    found: dict[str, Tensor] = {}

    def seen(_: int, arrays: ArrayRecord) -> None:
        times.append(time.perf_counter())
        found.update(arrays.to_torch_state_dict())

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy.start(grid, ArrayRecord(start), num_rounds=rounds, evaluate_fn=seen)

    resources = {"num_cpus": 1, "num_gpus": 0.0}
    run_simulation(server, client, clients, backend_config={"client_resources": resources})
    return found, np.diff(times).tolist()


def write(sizes: Sequence[int], side: int, folder: Path) -> tuple[int, ...]:
    """Write images (N, side, side, 1) of clients of these ``sizes``, and return their bounds.

    An image grows brighter downwards, and to the right the more, the higher its class.
    """
    draw, count = np.random.default_rng(0), sum(sizes)
    labels = draw.integers(0, CLASSES, count)
    ramp = np.linspace(0, 1, side)
    across = 40 * labels[:, None, None, None] / CLASSES * ramp[:, None]
    pixels = 40 + 160 * ramp[:, None, None] + across + draw.normal(0, 3, (count, side, side, 1))
    np.save(folder / "pixels.npy", pixels.clip(0, 255).astype(np.uint8))
    np.save(folder / "labels.npy", labels)
    return 0, *np.cumsum(sizes).tolist()


def main() -> None:
    """Print the seconds of each round."""
    setting, (clients, per_round, rounds) = sys.argv[1], map(int, sys.argv[2:])
    with tempfile.TemporaryDirectory() as folder:
        each, start = SETTINGS[setting], SETTINGS[setting].network().state_dict()
        job = Job(setting, folder, write([each.images] * clients, each.side, Path(folder)))
        _, seconds = simulate(job, start, per_round=per_round, rounds=rounds)
    print(json.dumps(seconds))


if __name__ == "__main__":
    here = Path(__file__).parent
    # Ray's workers import this module, and the benchmarks' networks, by name.
    os.environ["PYTHONPATH"] = f"{here}:{os.environ.get('PYTHONPATH', '')}"
    sys.path.insert(0, str(here))
    import flower_rounds

    flower_rounds.main()
