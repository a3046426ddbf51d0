"""Run one federation of the backdoor table, in this process, and measure it after every round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medspark import ownership
from medspark.data.native import MappedSplit
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.result import RobustnessResult
from medspark.evaluate.robust import evaluate
from medspark.federate.adversary.plan import malicious
from medspark.federate.backdoor import Detection, Probe, RoundOfAttack, detection, lasting, probe
from medspark.federate.config import FederationConfig
from medspark.federate.edge import EdgeSet
from medspark.federate.folder import FEDERATION_FILES, FederationFolder
from medspark.federate.network import new_network
from medspark.federate.server import InProcess, RoundRecord, Server
from medspark.federate.setting import Setting
from medspark.federate.start import begin
from medspark.federate.stored import ClientRows, read_pattern, write_edge
from medspark.federate.weights import Weights, unpack
from medspark.models.classifier import Classifier, evaluating
from medspark.shards.manifest import Manifest
from medspark.study.backdoor_report import Point

__all__ = ["Images", "Outcome", "run_federation", "weights_after"]

_BATCH = 256
# Every step has a few small images: a second thread costs more than it saves.
_THREADS = 1


@dataclass(frozen=True)
class Images:
    """The shards of the table, and the tail images that go with them."""

    shards: Path
    manifest: Manifest
    edge: EdgeSet | None = None

    @cached_property
    def test(self) -> MappedSplit:
        """The test images."""
        return MappedSplit(self.shards, self.manifest, "test")


@dataclass(frozen=True)
class Outcome:
    """What was measured of one federation.

    ``report`` is on the network at the attack's end, ``later`` the success some rounds after it.
    """

    report: RobustnessResult
    success: float | None
    later: float | None
    detection: Detection
    aggregation_seconds: float
    curve: tuple[Point, ...]


def weights_after(config: FederationConfig, images: Images, work: Path) -> Weights:
    """Return the weights (d,) after all rounds of a federation without an attack."""
    with _began(config, images, work, first=None) as server:
        for number in range(config.rounds):
            server.run(number)
        return np.asarray(FederationFolder(work).read(config.rounds - 1, "weights"))


def run_federation(
    config: FederationConfig,
    images: Images,
    attacks: AttackSettings,
    work: Path,
    *,
    first: Weights | None,
    averaged: int = 1,
    seen: Callable[[Point], object] = lambda _: None,
) -> Outcome:
    """Run the rounds of ``config`` from the weights ``first``, and return what was measured.

    The attack stops in round ``config.adversary.until_round``. Success is the mean over the last
    ``averaged`` rounds. ``work`` holds the files of the federation meanwhile. ``seen`` gets the
    figures of every round, measured on the test images that ``attacks`` chooses. Raises
    MedsparkError.
    """
    stopped = config.adversary.until_round or config.rounds
    model = new_network(config, images.manifest)
    edge = None if images.edge is None else images.edge.test
    tested = images.test.tensors(attacks.rows(len(images.test)))
    curve: list[Point] = []
    rounds: list[tuple[RoundOfAttack, tuple[int, ...]]] = []
    seconds = 0.0
    with _began(config, images, work, first=first) as server:
        folder = FederationFolder(work)
        liars = malicious(config.adversary, _clients(folder), seed=config.seed)
        for number in range(config.rounds):
            record = server.run(number)
            unpack(model, folder.read(number, "weights"), config.batch_norm)
            pattern = read_pattern(folder, number)
            probed = probe(config.adversary, *tested, edge=edge, pattern=pattern)
            curve.append(_point(record, model, tested, probed))
            seen(curve[-1])
            rounds.append((_attack(record, config, liars), record.clients))
            seconds += record.aggregation_seconds
            if number == stopped - 1:
                report = _report(model, images, attacks)
    successes = {point.round: point.success for point in curve}
    return Outcome(
        report=report,
        success=lasting(successes, stopped, 0, over=averaged),
        later=lasting(successes, stopped, config.rounds - stopped, over=averaged),
        detection=detection(rounds),
        aggregation_seconds=seconds / config.rounds,
        curve=tuple(curve),
    )


@contextmanager
def _began(
    config: FederationConfig, images: Images, work: Path, *, first: Weights | None
) -> Iterator[Server]:
    """Yield the server of a federation that begins in ``work``, which is empty afterwards."""
    folder, threads = FederationFolder(work), torch.get_num_threads()
    # What a killed run left is removed: a federation takes seconds.
    ownership.remove(work, FEDERATION_FILES)
    if first is not None:
        folder.round(-1).mkdir(parents=True)
        folder.write(-1, "weights", 0, first)
    torch.set_num_threads(_THREADS)
    try:
        begin(folder, config, images.shards, images.manifest)
        if images.edge is not None:
            write_edge(folder.edge, images.edge.train)
        setting = Setting(config, images.shards, folder)
        yield Server(setting, InProcess(setting), ClientRows(folder.path / "clients.npz"))
    finally:
        torch.set_num_threads(threads)
        ownership.remove(work, FEDERATION_FILES)


def _clients(folder: FederationFolder) -> range:
    return range(len(ClientRows(folder.path / "clients.npz")))


def _attack(record: RoundRecord, config: FederationConfig, liars: list[int]) -> RoundOfAttack:
    present = set(liars) & set(record.clients) if config.adversary.attacks_in(record.round) else ()
    return RoundOfAttack(malicious=tuple(sorted(present)), rejected=record.rejected)


def _point(
    record: RoundRecord, model: Classifier, tested: tuple[Tensor, Tensor], probed: Probe | None
) -> Point:
    return Point(
        round=record.round,
        success=None if probed is None else probed.success(model),
        main=_accuracy(model, *tested),
    )


@torch.no_grad()
def _accuracy(model: Classifier, pixels: Tensor, labels: Tensor) -> float:
    with evaluating(model):
        answers = torch.cat([model(part).argmax(1) for part in torch.split(pixels, _BATCH)])
    return float((answers == labels).float().mean())


def _report(model: Classifier, images: Images, attacks: AttackSettings) -> RobustnessResult:
    rows = attacks.rows(len(images.test))
    parts = np.array_split(rows, max(1, -(-len(rows) // attacks.batch_size)))
    batches = ((*images.test.tensors(part), torch.from_numpy(part)) for part in parts)
    return evaluate(model, batches, attacks, probed_below=attacks.probed_below(rows))
