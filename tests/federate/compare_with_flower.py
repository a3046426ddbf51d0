"""Our federation beside Flower's: the same weights after three rounds on the same images.

The networks of the benchmarks, four clients of unequal sizes, the same order of images. Flower's
clients are a plain loop of torch, and its server aggregates in float32. Its rounding is all that
differs, but a network with kinks multiplies it every round: at a rate of .05, on noise, 3e-8 became
4e-7 and 4e-6. So the rate is .01 and the images are smooth. In the environment of
``flower_rounds.py``, with pytest:

    PYTHONPATH=.:tests/federate:tests/benchmarks:tests/shards \\
        pytest --noconftest -c /dev/null tests/federate/compare_with_flower.py -s
"""

from __future__ import annotations

from pathlib import Path

import array_shards
import numpy as np
import pytest
import torch
from federation import SETTINGS

from medspark.data.native import MappedSplit
from medspark.federate.aggregate import RULES
from medspark.federate.client import Task, train_client
from medspark.federate.round import finish_round
from medspark.federate.weights import pack
from medspark.shards.manifest import read_manifest

pytest.importorskip("flwr", reason="flwr is not installed here")

import flower_rounds

SIZES, ROUNDS, SEED, RATE = (40, 13, 71, 26), 3, 7, 0.01


def ours(setting: str, folder: Path, bounds: tuple[int, ...]) -> np.ndarray:
    """Return the weights of our federation after the rounds, on the images that Flower's read."""
    pixels, labels = np.load(folder / "pixels.npy"), np.load(folder / "labels.npy")
    shards = array_shards.write_arrays(folder / "shards", {"train": (pixels, labels)})
    split = MappedSplit(shards, read_manifest(shards), "train")
    model = SETTINGS[setting].network()
    config = SETTINGS[setting].local().model_copy(update={"lr": RATE})
    weights = pack(model, config.batch_norm)
    for round in range(ROUNDS):
        answers = {
            client: train_client(
                model,
                split.subset(np.arange(*bounds[client : client + 2])),
                Task(weights, round=round, seed=SEED),
                config,
            )
            for client in range(len(SIZES))
        }
        weights = finish_round(weights, answers, RULES["fedavg"](), least=4, round=round).weights
    return weights


@pytest.mark.parametrize("setting", ["lr", "cnn"])
def test_three_rounds_give_the_weights_of_flowers_server(setting: str, tmp_path: Path):
    bounds = flower_rounds.write(SIZES, SETTINGS[setting].side, tmp_path)
    job = flower_rounds.Job(setting, str(tmp_path), bounds, SEED, RATE)
    start = flower_rounds.network(setting)  # sets one thread, with which torch rounds alike
    before = pack(start, "frozen")

    theirs, _ = flower_rounds.simulate(job, start.state_dict(), per_round=4, rounds=ROUNDS)
    mine = ours(setting, tmp_path, bounds)

    flowers = torch.cat([theirs[name].flatten() for name in start.state_dict()]).numpy()
    gap, moved = np.abs(mine - flowers).max(), np.abs(flowers - before).max()
    print(f"{setting}: {len(mine)} weights, largest gap {gap:.2g}, largest change {moved:.2g}")
    assert gap < 1e-6 < moved
