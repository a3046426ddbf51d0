"""Run the rounds of a federation on any executor: this process, or tasks of Spark.

Every round is: train the cohort, measure the updates if the rule needs it, weigh the clients, and
combine the updates coordinate by coordinate. Workers do all of it but the weighing. The server
holds numbers per client of the round, no update, and nothing per client of the federation but its
row count.

A round's result depends on (data, seed, configuration, clients left out) alone: sums are exact, and
chunks of coordinates have fixed bounds (``aggregate/exact.py``, ``aggregate/measure.py``).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import Field

from medspark.config import Config
from medspark.errors import RunError
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.summary import Array, Arrays, joined
from medspark.federate.adversary.plan import selected
from medspark.federate.aggregate.measure import CHUNK, Part, total
from medspark.federate.aggregate.rule import Measured, Rule, Weighing
from medspark.federate.client import train_client
from medspark.federate.evaluation import evaluation, own_networks
from medspark.federate.setting import Setting, Step
from medspark.federate.sfat import slack_counts
from medspark.federate.stored import ROOT, ClientRows
from medspark.federate.vectorised import bundles, vectorises
from medspark.federate.worker import Worker
from medspark.files import write_whole

__all__ = ["Executor", "InProcess", "RoundRecord", "Server", "groups", "slices"]


class Executor(Protocol):
    """Something that does the parts of steps, at most ``parts`` of them at once."""

    @property
    def parts(self) -> int:
        """The number of parts into which a step is best divided."""

    def do(self, step: Step, parts: int) -> list[dict[str, Any]]:
        """Do all ``parts`` of a step; return their answers in order."""


class InProcess:
    """Does the parts of steps one after the other in this process."""

    def __init__(self, setting: Setting, *, parts: int = 1) -> None:
        self.parts = parts
        self._worker = Worker(setting)

    def do(self, step: Step, parts: int) -> list[dict[str, Any]]:
        """Do all ``parts`` of a step; return their answers in order."""
        return [self._worker.do(step, part) for part in range(parts)]


class RoundRecord(Config):
    """What happened in a round; ``result.json`` of its folder, without robustness figures."""

    round: int
    clients: tuple[int, ...] = Field(description="clients whose update was aggregated")
    left_out: dict[int, str] = Field({}, description="the other clients of the cohort, with reason")
    rejected: tuple[int, ...] | None = Field(
        None, description="clients that the rule rejected; none if the rule does not detect"
    )
    images: int = Field(description="images of the counted clients")
    steps: int = Field(description="steps of the counted clients, summed")
    loss: float = Field(description="mean loss of the counted clients, weighted by images")
    change: float = Field(description="Euclidean norm of the change of the weights")
    epsilon: float | None = Field(None, description="of user-level privacy so far")
    seconds: float = Field(description="duration of the round")
    aggregation_seconds: float
    bytes_up: int = Field(description="bytes that the counted clients sent")
    bytes_down: int = Field(description="bytes that the cohort received")


class Server:
    """Runs one round after another, each committed by a file that is written last."""

    def __init__(self, setting: Setting, executor: Executor, clients: ClientRows) -> None:
        self._setting, self._executor = setting, executor
        self._config, self._folder = setting.config, setting.folder
        self._counts = np.asarray(clients.counts)
        self._holders = np.flatnonzero(self._counts).tolist()
        self._own = Worker(setting)
        self._rule: Rule = self._config.rule_for(len(self._holders))
        self._memory: dict[int, int] = {}
        self._length = len(self._folder.read(self._folder.finished() - 1, "weights"))
        self._vectorised = setting.train is train_client and self._vectorises()

    def _vectorises(self) -> bool:
        manifest = self._setting.manifest
        shape = manifest.channels, manifest.height, manifest.width
        return vectorises(self._config, self._setting.network, shape, weights=self._length)

    def resume(self) -> list[RoundRecord]:
        """Return the records of the finished rounds."""
        numbers = range(self._folder.finished())
        records = [self._record(number) for number in numbers]
        for record in records[:-1]:
            self._memory |= dict.fromkeys(record.clients, record.round)
        if records:
            self._tidy(records[-1])
        return records

    def run(self, number: int) -> RoundRecord:
        """Run round ``number``, which follows the finished ones.

        Raises RunError if too few clients answer, or if the server's own training fails.
        """
        began = time.monotonic()
        folder = self._folder.round(number)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder.clear(number)
        asked = self._cohort(number)
        step, answers = self._train(number, asked)
        left_out = self._folder.left_out(number)
        counted = sorted(client for client in answers if client != ROOT)
        self._check(number, counted, left_out)
        trained = time.monotonic()
        step |= {"counted": counted}
        weighing, seen = self._weigh(step, counted, answers)
        parts = self._spread(step | {"kind": "combine", "weighing": _document(weighing)})
        figures = [answers[client] for client in counted]
        images = sum(int(each["images"]) for each in figures)
        weighted = sum(each["loss"] * each["images"] for each in figures)
        vectors = 2 if self._config.scaffold else 1
        record = RoundRecord(
            round=number,
            clients=tuple(counted),
            left_out=left_out,
            rejected=_rejected(seen, weighing),
            images=images,
            steps=sum(int(each["steps"]) for each in figures),
            loss=weighted / max(images, 1),
            change=math.sqrt(math.fsum(square for part in parts for square in part["squares"])),
            epsilon=self._epsilon(number),
            seconds=time.monotonic() - began,
            aggregation_seconds=time.monotonic() - trained,
            bytes_up=len(counted) * self._length * 4 * vectors,
            bytes_down=len(asked) * self._length * 4 * vectors,
        )
        write_whole(folder / "result.json", record.model_dump_json())
        self._tidy(record)
        return record

    def evaluate(
        self, model: Path, config: AttackSettings, *, split: str, total: int, work: Path
    ) -> Arrays:
        """Attack images of ``split``, which holds ``total``, with the network in ``model``.

        Returns the arrays of all images (``evaluate/summary.py``). Pieces in ``work`` are kept.
        """
        document = self._test(model, config, split, total, work)
        job = evaluation(self._setting.shards, document)
        work.mkdir(parents=True, exist_ok=True)
        parts = min(self._executor.parts, job.pieces)
        pieces = [list(range(part, job.pieces, parts)) for part in range(parts)]
        self._executor.do({"kind": "evaluate", "job": document, "pieces": pieces}, parts)
        return job.arrays()

    def evaluate_own(
        self,
        model: Path,
        config: AttackSettings,
        rows: Mapping[int, Array],
        *,
        split: str,
        total: int,
        work: Path,
    ) -> Arrays:
        """Attack the test ``rows`` of each client in the network with the client's batch norms.

        All else is as in ``evaluate``, and so are the arrays, of these rows alone.
        """
        document = self._test(model, config, split, total, work)
        clients = {str(c): [part.tolist(), self._memory.get(c)] for c, part in rows.items()}
        shares = groups(
            list(rows), {c: len(part) for c, part in rows.items()}, self._executor.parts
        )
        step: Step = {
            "kind": "evaluate_own",
            "job": document,
            "clients": clients,
            "groups": [[str(client) for client in share] for share in shares],
        }
        self._executor.do(step, len(shares))
        job = evaluation(self._setting.shards, document)
        return joined([each.arrays() for each in own_networks(self._folder, job, clients)])

    def _test(
        self, model: Path, config: AttackSettings, split: str, total: int, work: Path
    ) -> dict[str, Any]:
        images = len(config.rows(total))
        return {
            "model": str(model),
            "config": config.model_dump(mode="json"),
            "split": split,
            "total": total,
            "piece": max(1, min(-(-images // self._executor.parts), 4 * config.batch_size)),
            "work": str(work),
        }

    def _cohort(self, number: int) -> list[int]:
        privacy, seed = self._config.privacy, self._config.seed
        if privacy is not None:
            return privacy.cohort(self._holders, seed=seed, round=number)
        per_round = self._config.clients.per_round or len(self._holders)
        adversary = self._config.adversary
        return selected(adversary, self._holders, per_round, seed=seed, round=number)

    def _train(self, number: int, asked: Sequence[int]) -> tuple[Step, dict[int, dict[str, float]]]:
        together = bundles(asked, self._counts) if self._vectorised else []
        together = [bundle for bundle in together if len(bundle) > 1]
        shares = groups(asked, self._counts, self._executor.parts, together)
        if "root" in self._rule.references:
            shares = [[*shares[0], ROOT], *shares[1:]] if shares else [[ROOT]]
        step: Step = {
            "kind": "train",
            "round": number,
            "groups": shares,
            "together": [[b for b in together if b[0] in share] for share in shares],
            "trainers": len(shares),
            "total": float(max(1, self._counts[list(asked)].sum())),
            "cohort": float(max(1, len(asked))),
            "clients": len(self._holders),
            "adds_up": self._config.adds_up,
            "images": {str(c): int(self._counts[c]) for c in asked},
            "pattern": self._pattern(number),
            "memory": {str(c): self._memory[c] for c in asked if c in self._memory},
        }
        write_whole(self._folder.round(number) / "plan.json", json.dumps(step))
        answers = self._executor.do(step, len(shares)) if shares else []
        if self._config.adversary.adversary.needs_honest:
            trained = [int(c) for part in answers for c in part["clients"]]
            honest = {"kind": "forge", "trained": sorted(set(trained) - {ROOT})}
            answers += self._executor.do(step | honest, 1)
        return step, {int(c): each for part in answers for c, each in part["clients"].items()}

    def _pattern(self, number: int) -> str | None:
        """Return the file of the newest trigger that an adversary prepared."""
        if self._config.adversary.name == "none":
            return None
        newest = self._folder.newest_pattern(number - 1)
        return None if newest is None else str(newest)

    def _check(self, number: int, counted: Sequence[int], left_out: Mapping[int, str]) -> None:
        if ROOT in left_out:
            raise RunError(f"The server could not train on its images: {left_out[ROOT]}.")
        least = 0 if self._rule.least == 0 else self._config.clients.least
        if len(counted) < least:
            client = min(left_out, default=None)
            why = "" if client is None else f" Client {client} was left out: {left_out[client]}."
            raise RunError(
                f"Round {number + 1} has {len(counted)} of the {least} usable answers that it "
                f"needs.{why}"
            )
        self._rule.check(len(counted))

    def _weigh(
        self, step: Step, counted: Sequence[int], answers: Mapping[int, Mapping[str, float]]
    ) -> tuple[Weighing, Measured]:
        counts = [answers[client]["images"] for client in counted]
        if self._config.sfat.slack:
            losses = [answers[client]["loss"] for client in counted]
            counts = slack_counts(counts, losses, **self._config.sfat.model_dump()).tolist()
        squares = np.array([answers[client]["square"] for client in counted])
        products = np.empty((0, 0))
        if self._rule.needs == "products" and counted:
            found = self._spread(step | {"kind": "measure"})
            parts = [
                Part(np.array(each[0]), np.array(each[1]))
                for answer in found
                for each in answer["chunks"]
            ]
            whole = total(parts)
            squares, products = whole.squares, whole.products
        seen = Measured(
            tuple(counted), np.array(counts, float), squares, products, self._config.seed,
            int(step["round"]),
        )  # fmt: skip
        return self._rule.weigh(seen), seen

    def _spread(self, step: Step) -> list[dict[str, Any]]:
        """Do a step by slices of coordinates; a single slice of sums is done here."""
        shares = slices(self._length, self._executor.parts)
        step = step | {"slices": shares}
        if len(shares) == 1 and step["adds_up"]:
            return [self._own.do(step, 0)]
        return self._executor.do(step, len(shares))

    def _epsilon(self, number: int) -> float | None:
        privacy = self._config.privacy
        return None if privacy is None else privacy.epsilon(len(self._holders), number + 1)

    def _record(self, number: int) -> RoundRecord:
        return RoundRecord.model_validate_json(
            (self._folder.round(number) / "result.json").read_text()
        )

    def _tidy(self, record: RoundRecord) -> None:
        """Remove what the next round does not need."""
        number = record.round
        if self._config.adversary.name != "none":
            self._folder.forget_patterns(number)
        self._folder.forget(number, ("update",))
        # The next round's sums overwrite these.
        over = number + 1 == self._config.rounds
        self._folder.forget(number if over else number - 1, ("sum", "controls"))
        self._folder.forget(number - 1, ("weights", "change", "state*", "control"))
        for client in record.clients:
            last = self._memory.get(client)
            if last is not None and self._config.keeps_memory:
                self._folder.memory(client, last).unlink(missing_ok=True)
            if last is not None and self._rule.remembers:
                self._folder.forget(last, (f"history-{client:06d}",))
            self._memory[client] = number


def groups(
    asked: Sequence[int], counts: Any, parts: int, together: Sequence[Sequence[int]] = ()
) -> list[list[int]]:
    """Divide clients into at most ``parts`` groups with about as many images in each.

    Clients ``together`` are in one group. Who has most images is placed first, each with the group
    that has the fewest images.
    """
    bundled = {client for bundle in together for client in bundle}
    units = [*together, *([client] for client in asked if client not in bundled)]
    found: list[list[int]] = [[] for _ in range(min(parts, len(units)))]
    loads = [0] * len(found)
    sizes = [sum(int(counts[client]) for client in unit) for unit in units]
    for size, unit in sorted(zip(sizes, units, strict=True), key=lambda pair: (-pair[0], pair[1])):
        lightest = loads.index(min(loads))
        found[lightest] += unit
        loads[lightest] += size
    return [sorted(group) for group in found]


def slices(length: int, parts: int) -> list[tuple[int, int]]:
    """Divide coordinates into at most ``parts`` ranges of whole chunks; the last may be shorter."""
    pieces = -(-length // CHUNK)
    parts = max(1, min(parts, pieces))
    bounds = [CHUNK * (pieces * part // parts) for part in range(parts)] + [length]
    return list(pairwise(bounds))


def _document(weighing: Weighing) -> dict[str, Any]:
    references = weighing.references
    return {
        "factors": weighing.factors.tolist(),
        "divisor": weighing.divisor,
        "references": None if references is None else references.tolist(),
        "noise": weighing.noise,
    }


def _rejected(seen: Measured, weighing: Weighing) -> tuple[int, ...] | None:
    if weighing.rejected is None:
        return None
    rejected = zip(seen.clients, weighing.rejected, strict=True)
    return tuple(client for client, away in rejected if away)
