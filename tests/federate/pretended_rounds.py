"""A federation whose clients send numbers in place of training, so that a round takes no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import array_shards
import numpy as np
import numpy.typing as npt
import pytest
import small

from medspark.data.native import MappedSplit
from medspark.federate import privacy, server, setting, start
from medspark.federate.aggregate import aggregate, measure
from medspark.federate.client import Answer, Memory, Task
from medspark.federate.config import FederationConfig
from medspark.federate.folder import FederationFolder
from medspark.federate.round import cohort
from medspark.federate.server import InProcess, RoundRecord, Server
from medspark.federate.setting import Setting
from medspark.federate.start import begin
from medspark.federate.stored import ROOT, ClientRows
from medspark.federate.weights import apply, difference
from medspark.shards.manifest import read_manifest

CLIENTS, SEED = 8, 3
SKEWED = {"by": "dirichlet", "count": CLIENTS}


def write(folder: Path, *, images: int = 40) -> Path:
    """Write images (N, 12, 12, 1); the first pixel is the number, from 200 on of validation's."""
    splits = {}
    for split, first, count in (("train", 0, images), ("val", 200, 6)):
        pixels = np.full((count, 12, 12, 1), 100, dtype=np.uint8)
        pixels[:, 0, 0, 0] = (first + np.arange(count)) % 256
        splits[split] = pixels, np.arange(count) % 2
    return array_shards.write_arrays(folder, splits)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("rounds") / "shards")


@pytest.fixture(autouse=True)
def tiny_networks_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (setting, start):
        monkeypatch.setattr(module, "new_network", lambda config, manifest: small.network())
    monkeypatch.setattr(privacy, "epsilon", lambda rate, noise, rounds, delta: float(rounds))
    for module in (measure, server):
        monkeypatch.setattr(module, "CHUNK", 256)


def first_of(rows: MappedSplit) -> int:
    """Return the number of a client's first image, by which a pretended client is known."""
    return int(rows.gather(np.array([0]))[0][0, 0, 0, 0])


def update_of(rows: MappedSplit, round: int, length: int) -> npt.NDArray[np.float64]:
    return np.random.default_rng([first_of(rows), round]).normal(0.001, 0.01, length)


def pretend(network: Any, rows: MappedSplit, task: Task, config: Any, **given: Any) -> Answer:
    """Answer with an update that the client's first image and the round determine."""
    length, liar = len(task.weights), given.get("liar")
    update = update_of(rows, task.round, length)
    if liar is not None:
        update = liar.adversary.send(update, liar.known)
    memory = given.get("memory") or Memory()
    control, moved = memory.control, None
    if config.scaffold:
        moved = np.random.default_rng([first_of(rows), task.round, 1]).normal(size=length)
        control = moved if control is None else control + moved
    weights, loss = apply(task.weights, update), 1 / (1 + first_of(rows))
    return Answer(weights, len(rows), 2, loss, Memory(control=control), moved)


PLAIN = {"optimiser": "sgd", "batch_norm": "frozen"}


class Fails:
    """An executor that keeps the step that it is asked for, and fails."""

    parts = 1

    def do(self, step: Any, parts: int) -> Any:
        self.step = step
        raise KeyboardInterrupt


class Rounds:
    """A federation in ``place``; its clients answer by ``train``, in the training mode ``mode``."""

    def __init__(self, shards: Path, place: Path, *, parts: int = 1, train: Any = pretend,
                 mode: str = "fused_noise", **settings: Any) -> None:  # fmt: skip
        settings = {"clients": SKEWED, "seed": SEED, "train": {"mode": mode}} | PLAIN | settings
        self.config = FederationConfig.model_validate(settings)
        self.folder, self.manifest = FederationFolder(place), read_manifest(shards)
        begin(self.folder, self.config, shards, self.manifest)
        self.setting = Setting(self.config, shards, self.folder, train)
        self.clients = ClientRows(place / "clients.npz")
        self.executor = InProcess(self.setting, parts=parts)
        self.server = Server(self.setting, self.executor, self.clients)
        self.records = self.server.resume()

    def run(self, rounds: int = 1) -> list[RoundRecord]:
        for number in range(len(self.records), len(self.records) + rounds):
            self.records.append(self.server.run(number))
        return self.records

    @property
    def weights(self) -> npt.NDArray[np.float32]:
        return self.folder.read(len(self.records) - 1, "weights")

    def rows(self, client: int) -> MappedSplit:
        split = MappedSplit(self.setting.shards, self.manifest, "val" if client < 0 else "train")
        return split if client == ROOT else split.subset(self.clients[client])

    def update(self, weights: Any, client: int, round: int) -> npt.NDArray[np.float64]:
        """Return what an honest client sends."""
        task = Task(weights, round=round)
        return difference(pretend(None, self.rows(client), task, self.config).weights, weights)


def in_memory(found: Rounds, rounds: int) -> tuple[npt.NDArray[np.float32], list[Any]]:
    """Return the weights of the same rounds aggregated in memory, and the outcome of each."""
    config, weights = found.config, found.folder.read(-1, "weights")
    rule = config.rule_for(CLIENTS)
    state: Any = {}
    centre, sent, outcomes = np.zeros(len(weights)), {}, []
    for number in range(rounds):
        asked = cohort(range(CLIENTS), config.clients.per_round or CLIENTS, seed=SEED, round=number)
        updates = {c: found.update(weights, c, number) for c in asked}
        outcome = aggregate(
            rule,
            np.stack([*updates.values()]),
            counts=[len(found.clients[c]) for c in asked],
            clients=asked,
            references={
                "root": found.update(weights, ROOT, number), "centre": centre, "weights": weights,
            },
            history=np.stack([sent.get(c, np.zeros(len(weights))) for c in asked]),
            state=state,
            seed=SEED,
            round=number,
        )  # fmt: skip
        sent |= {c: sent.get(c, 0) + updates[c] for c in asked}
        weights, state, centre = apply(weights, outcome.change), outcome.state, outcome.change
        outcomes.append(outcome)
    return weights, outcomes
