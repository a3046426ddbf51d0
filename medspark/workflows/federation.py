"""The rounds of one federation, the validations between them, and the final test."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyspark.sql import SparkSession
from tqdm import tqdm

from medspark.data.native import MappedSplit
from medspark.errors import UsageError
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.summary import Arrays, Detail, summarise
from medspark.federate.backdoor import probe
from medspark.federate.edge import edge_set
from medspark.federate.folder import FederationFolder
from medspark.federate.network import client_norms, new_network, save_network
from medspark.federate.partition import clients_of
from medspark.federate.result import ClientFigures, FederationResult, RoundFigures
from medspark.federate.server import Executor, InProcess, RoundRecord, Server
from medspark.federate.setting import Setting
from medspark.federate.start import begin, owners_of
from medspark.federate.stored import ClientRows, read_pattern, write_edge
from medspark.federate.worker import Worker
from medspark.files import json_digest, write_whole
from medspark.launch.standing import standing_tasks
from medspark.models.card import read_card
from medspark.models.config import PRETRAINED
from medspark.remote import any_path
from medspark.shards.local import patients_of
from medspark.shards.manifest import Manifest
from medspark.spark.slots import wait_for
from medspark.track.journal import Journal, JournalReader
from medspark.track.runs import TrackedRun
from medspark.train.decide import decide_on
from medspark.train.final_test import calibrate_on
from medspark.train.world import World
from medspark.workflows.federate_config import FederateConfig
from medspark.workflows.federate_report import write_federation_report

__all__ = ["Federation", "rows_in"]

logger = logging.getLogger(__name__)

_ROOM_SECONDS = 30.0
# More rows of clients than anybody reads.
_MOST_CLIENTS_REPORTED = 1000


class Federation:
    """One run of a federation in its folder."""

    def __init__(self, config: FederateConfig, folder: Path, manifest: Manifest) -> None:
        """Prepare the network and the tail images; nothing is written.

        Raises UsageError if the weights do not fit the network, or the tail images the shards.
        """
        self.config, self.manifest = config, manifest
        self.place = folder
        self._files = FederationFolder(folder)
        self._shards = config.shards.resolve()
        self._setting = Setting(_placed(config), self._shards, self._files)
        self._model = new_network(self._setting.config, manifest)
        self._edge = edge_set(config.adversary, manifest, seed=config.seed)

    def begin(self) -> None:
        """Write what the first round needs, unless it is there."""
        begin(self._files, self._setting.config, self._shards, self.manifest)
        if self._edge is not None and not self._files.edge.exists():
            write_edge(self._files.edge, self._edge.train)

    def run(self, executor: Executor, run: TrackedRun) -> FederationResult:
        """Run the missing rounds, test the network, write the report, and return the result."""
        clients = ClientRows(self._files.path / "clients.npz")
        server = Server(self._setting, executor, clients)
        rounds = self._rounds(server, run)
        self._save(len(rounds) - 1, self.place / "model", rounds)
        self._calibrate()
        config, split = self.config.evaluate, "test"
        arrays = server.evaluate(
            self.place / "model",
            config,
            split=split,
            total=rows_in(self.manifest, split),
            work=self.place / "pieces" / self._digest_of(config),
        )
        card, detail = read_card(self.place / "model"), None
        if card.decision is not None:
            groups = patients_of(self._shards, self.manifest, split)[arrays["rows"]]
            detail = Detail(groups=groups)
        tested = summarise(
            arrays, config.trials(), limits=config.sanity, positive=card.positive, detail=detail
        )
        result = FederationResult.model_validate(
            tested.as_json()
            | ({} if card.decision is None else {"decision": card.decision.model_dump(mode="json")})
            | {
                "mode": self.config.train.mode,
                "aggregate": "dp_fedavg" if self.config.privacy else self.config.aggregate,
                "rounds": [each.as_json() for each in rounds],
                "per_client": [each.as_json() for each in self._per_client(server, arrays)],
                "clients": int((clients.counts > 0).sum()),
                "clients_by": self.config.clients.by,
                "model": str(self.place / "model"),
                "architecture": self._model.architecture,
                "batch_norm": self.config.batch_norm,
                "steps": sum(each.steps for each in rounds),
                "epsilon": rounds[-1].epsilon,
                "train_images": int(clients.counts.sum()),
                "dataset_digest": self.manifest.digest,
                "seconds": sum(each.seconds for each in rounds),
                "tasks": executor.parts,
                "report": str(self.place / "report" / "report.html"),
            }
        )
        write_federation_report(self.place / "report", result, eps=self.config.attack.eps)
        return result

    @contextmanager
    def executor(self, spark: SparkSession | None) -> Iterator[Executor]:
        """Lend tasks of ``spark`` that train clients, or this process if it is None.

        Raises UsageError if Spark has fewer slots than the tasks that were asked for.
        """
        if spark is None:
            yield InProcess(self._setting)
            return
        setting = self._setting
        wanted = self.config.tasks
        slots = wait_for(spark, wanted or 1, on_executors=True, seconds=_ROOM_SECONDS).tasks
        if wanted > slots:
            raise UsageError(f"tasks is {wanted}, but Spark has {slots} slots.")
        clients = clients_of(self.config.clients, self.manifest.splits["train"])
        tasks = min(wanted or slots, self.config.clients.in_round(clients))
        with standing_tasks(
            spark, self.place, lambda: Worker(setting, expendable=True), tasks=max(1, tasks)
        ) as crew:
            yield crew

    def _rounds(self, server: Server, run: TrackedRun) -> list[RoundFigures]:
        """Run the missing rounds; return all."""
        records: list[RoundRecord] = server.resume()
        total = self.config.rounds
        if records:
            logger.info("%d of %d rounds are finished already", len(records), total)
        found = [self._with_figures(server, record) for record in records[:total]]
        with (
            Journal(run.spool.journal) as journal,
            tqdm(total=total, initial=len(found), unit="round", desc="federation") as bar,
        ):
            known = {record.step for record in JournalReader(run.spool.journal).poll()}
            for each in found:
                if each.round + 1 not in known:  # killed before its metrics reached the disk
                    journal.record(each.round + 1, _metrics(each))
            for number in range(len(found), total):
                figures_of_round = self._with_figures(server, server.run(number))
                found.append(figures_of_round)
                metrics = _metrics(figures_of_round)
                journal.record(number + 1, metrics)
                _log_left_out(figures_of_round)
                bar.set_postfix({k: f"{v:.3g}" for k, v in metrics.items() if k in _SHOWN})
                bar.update()
        return found

    def _with_figures(self, server: Server, record: RoundRecord) -> RoundFigures:
        """Return the round with its validation, done now unless it was done before."""
        number, plan = record.round, self.config.validate_rounds
        kept = self._files.round(number) / "figures.json"
        if kept.exists():
            return RoundFigures.model_validate_json(kept.read_text())
        plain = RoundFigures.model_validate(record.model_dump())
        split = "val" if rows_in(self.manifest, "val") else "train"
        if not plan.due(number, self.config.rounds) or not self._files.has(number, "weights"):
            return plain
        model = self._files.round(number) / "model"
        self._save(number, model, [record])
        config = AttackSettings(
            attacks=("pgd",),
            norm=self.config.attack.norm,
            eps=(self.config.attack.eps,),
            steps=plan.steps,
            images=plan.images,
            sanity_images=0,
            seed=self.config.seed,
        )
        arrays = server.evaluate(
            model,
            config,
            split=split,
            total=rows_in(self.manifest, split),
            work=self._files.round(number) / "pieces",
        )
        seen = summarise(arrays, config.trials(), limits=config.sanity)
        found = plain.model_copy(
            update={
                "clean": seen.clean,
                "attacks": seen.attacks,
                "backdoor": self._backdoor(number, config),
            }
        )
        write_whole(kept, found.model_dump_json(exclude_unset=True))
        self._files.forget_validation(number)
        return found

    def _backdoor(self, number: int, config: AttackSettings) -> float | None:
        """Return the success of the backdoor on test images; None without one.

        The network is the one that was saved last.
        """
        if self.config.adversary.name == "none":
            return None
        split = MappedSplit(self._shards, self.manifest, "test")
        images, labels = split.tensors(config.rows(len(split)))
        probed = probe(
            self.config.adversary,
            images,
            labels,
            edge=None if self._edge is None else self._edge.test,
            pattern=read_pattern(self._files, number),
        )
        return None if probed is None else probed.success(self._model)

    def _save(self, number: int, folder: Path, rounds: list[Any]) -> None:
        config = self._setting.config
        norms = None
        if config.batch_norm == "local":
            last = {client: each.round for each in rounds for client in each.clients}
            norms = client_norms(self._files, last)
        images = []
        if config.batch_norm == "reestimate":
            split = MappedSplit(self._shards, self.manifest, "val")
            rows = np.arange(min(512, len(split)))
            images = [split.tensors(part)[0] for part in np.array_split(rows, -(-len(rows) // 64))]
        weights = self._files.read(number, "weights")
        save_network(
            folder, self._model, weights, config, self.manifest, norms=norms, images=images
        )

    def _calibrate(self) -> None:
        split = "val" if rows_in(self.manifest, "val") else "train"
        images = MappedSplit(self._shards, self.manifest, split)
        size = self.config.evaluate.batch_size
        world = World(0, 0, 1, torch.device("cpu"))
        calibrate_on(self.place / "model", images, batch_size=size, device=world.device)
        if self.config.decision.criterion is not None:
            decide_on(
                self.place / "model",
                images,
                patients_of(self._shards, self.manifest, split),
                self.config.decision,
                threat=self.config.attack,
                settings=self.config.evaluate,
                world=world,
            )

    def _per_client(self, server: Server, arrays: Arrays) -> list[ClientFigures]:
        """Return the figures on the test images of each client that would hold some.

        Clients that keep their batch norms are tested with them; ``arrays`` are of the mean's.
        """
        positive = read_card(self.place / "model").positive
        owners, names = owners_of(self._setting.config, self._shards, self.manifest, "test")
        if owners is None:
            return []
        config, found = self.config.evaluate, []
        held = owners[arrays["rows"]]
        clients = np.unique(held[held >= 0])[:_MOST_CLIENTS_REPORTED].tolist()
        private = self.config.batch_norm == "local" and self.config.clients.by != "patient"
        if private and clients:
            arrays = server.evaluate_own(
                self.place / "model",
                config,
                {client: arrays["rows"][held == client] for client in clients},
                split="test",
                total=rows_in(self.manifest, "test"),
                work=self.place / "pieces" / f"{self._digest_of(config)}-own",
            )
            held = owners[arrays["rows"]]
        for client in clients:
            own = {name: values[held == client] for name, values in arrays.items()}
            seen = summarise(own, config.trials(), limits=config.sanity, positive=positive)
            found.append(
                ClientFigures(
                    client=client,
                    site=names[client] if names else None,
                    images=seen.images,
                    own_network=private,
                    clean=seen.clean,
                    worst_case=seen.worst_case,
                )
            )
        return found

    def _digest_of(self, config: AttackSettings) -> str:
        asked = config.model_dump(mode="json")
        if self.config.decision.criterion is not None:
            asked["decision"] = self.config.decision.model_dump(mode="json")
        return json_digest(asked)[:16]


_SHOWN = ("loss", "val/accuracy", "val/pgd_accuracy", "backdoor_success")


def _metrics(round: RoundFigures) -> dict[str, float]:
    """Return the figures of a round by their MLflow metric names."""
    found = {
        "loss": round.loss,
        "clients_counted": float(len(round.clients)),
        "clients_left_out": float(len(round.left_out)),
        "round_seconds": round.seconds,
        "change_norm": round.change,
    }
    if round.epsilon is not None:
        found["epsilon"] = round.epsilon
    if round.clean is not None and round.clean.accuracy is not None:
        found["val/accuracy"] = round.clean.accuracy
    if round.backdoor is not None:
        found["backdoor_success"] = round.backdoor
    if round.attacks and round.attacks[0].accuracy is not None:
        found["val/pgd_accuracy"] = round.attacks[0].accuracy
    return found


def _log_left_out(round: RoundFigures) -> None:
    for client, reason in round.left_out.items():
        logger.warning("round %d goes on without client %d: %s", round.round + 1, client, reason)


def rows_in(manifest: Manifest, split: str) -> int:
    return manifest.splits[split].rows if split in manifest.splits else 0


def _placed(config: FederateConfig) -> FederateConfig:
    """Return ``config`` with the absolute path of the weights: workers run in other folders."""
    if config.model.weights in (None, PRETRAINED):
        return config
    model = config.model.model_copy(
        update={"weights": str(any_path(str(config.model.weights)).resolve())}
    )
    return config.model_copy(update={"model": model})
