"""The part of a worker in a round: train some clients, measure and combine some coordinates.

A worker is given a step and the number of its part. It finds everything else in the shared folder,
so any worker can do any part, and doing a part again writes the same files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medspark.data.native import MappedSplit
from medspark.errors import MedsparkError
from medspark.federate.adversary.plan import forged, plan_liars, waits
from medspark.federate.aggregate.exact import ExactSum, check, squared_norm
from medspark.federate.aggregate.measure import measure
from medspark.federate.aggregate.noise import gaussian
from medspark.federate.aggregate.rule import Measured, Rule, Vector, Weighing
from medspark.federate.client import Answer, Liar, Memory, Task, train_client
from medspark.federate.config import FederationConfig
from medspark.federate.edge import EdgeImages
from medspark.federate.evaluation import evaluation, own_networks
from medspark.federate.folder import FederationFolder, Overwriting, write_array
from medspark.federate.guard import Deadline, Progress
from medspark.federate.network import new_network
from medspark.federate.resident import Resident
from medspark.federate.stored import (
    ROOT,
    ClientRows,
    StoredUpdates,
    chunks_within,
    read_edge,
    read_memory,
    write_memory,
)
from medspark.federate.weights import Statistics, Weights
from medspark.redact import safe_text
from medspark.seeding import derive
from medspark.shards.manifest import Manifest, read_manifest
from medspark.shards.plan import permute

__all__ = ["Setting", "Step", "Worker"]

# A step of a round in the form of JSON: its ``kind``, its round, and what each part has to do.
Step = dict[str, Any]

# Answers of so many bytes are held, to be added together.
_HELD_BYTES = 1 << 27

# A client that was being trained when a task died, so often, is left out.
_DEATHS = 2


@dataclass(frozen=True)
class Setting:
    """All settings that a worker needs; it is pickled to the tasks."""

    config: FederationConfig
    shards: Path
    folder: FederationFolder
    train: Callable[..., Answer] = train_client

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest of the shards."""
        return read_manifest(self.shards)


class Worker:
    """Does parts of steps; it keeps the network and the mapped images between them."""

    def __init__(self, setting: Setting, *, expendable: bool = False) -> None:
        """``expendable``: end this process if a client does not answer before the deadline."""
        self._setting = setting
        self._config = setting.config
        self._folder = setting.folder
        self._known_rule: Rule | None = None
        self._sums = Overwriting()
        deadline = setting.config.clients.deadline if expendable else None
        self._deadline = None if deadline is None else Deadline(setting.folder, deadline)

    def do(self, step: Step, part: int) -> dict[str, Any]:
        """Do one part of ``step`` and return its answer, in the form of JSON."""
        kinds: Mapping[str, Callable[[Step, int], dict[str, Any]]] = {
            "train": self._train,
            "forge": self._forge,
            "measure": self._measure,
            "combine": self._combine,
            "evaluate": self._evaluate,
            "evaluate_own": self._evaluate_own,
        }
        return kinds[step["kind"]](step, part)

    # --- training ---

    def _train(self, step: Step, part: int) -> dict[str, Any]:
        number, group = int(step["round"]), [int(client) for client in step["groups"][part]]
        base = self._folder.read(number - 1, "weights")
        control = self._control(number)
        sums = ExactSum(len(base), weight=step["total"]) if step["adds_up"] else None
        controls = ExactSum(len(base), weight=step["cohort"]) if self._config.scaffold else None
        progress = Progress(self._folder, number, part)
        left_out, liars = self._folder.left_out(number), self._liars(step)
        # Before the first client, so that its deadline does not count the preparations.
        self._network, self._split, self._clients  # noqa: B018
        trained: dict[str, dict[str, float]] = {}
        answers: dict[int, Answer] = {}
        for client in group:
            if client in left_out or waits(liars.get(client)):
                continue
            if progress.deaths(client) >= _DEATHS:
                reason = f"its task died {_DEATHS} times while training it"
                self._folder.leave_out(number, client, reason)
                continue
            task = Task(base, number, self._config.seed, control, self._config.rounds)
            with progress.of(client), self._limit(number, client):
                answer = self._answer(task, client, step, liars.get(client))
            if isinstance(answer, str):
                self._folder.leave_out(number, client, answer)
                continue
            answers[client] = answer
            if len(answers) * base.nbytes >= _HELD_BYTES:
                trained |= self._keep(step, base, answers, sums, controls)
                answers = {}
        trained |= self._keep(step, base, answers, sums, controls)
        progress.close()
        if sums is not None:
            self._sums.write(self._folder.round(number) / f"sum-{part:05d}.npy", sums.units)
        if controls is not None:
            self._sums.write(
                self._folder.round(number) / f"controls-{part:05d}.npy", controls.units
            )
        return {"clients": trained}

    def _answer(self, task: Task, client: int, step: Step, liar: Liar | None) -> Answer | str:
        """Return the answer of a client, or why it is left out."""
        try:
            answer = self._setting.train(
                self._network,
                self._rows(client),
                task,
                self._config,
                augmentation=self._config.augment,
                memory=self._memory(client, step),
                liar=liar,
            )
        except MedsparkError as error:
            return safe_text(str(error)).rstrip(".")
        except Exception as error:  # noqa: BLE001 - one client's failure is not the round's
            return safe_text(f"{type(error).__name__}: {error}").splitlines()[0].rstrip(".")
        if answer.weights.shape != task.weights.shape:
            shape = answer.weights.shape
            return f"the answer has shape {shape} instead of {task.weights.shape}"
        return answer

    def _factor(self, step: Step, client: int, answer: Answer, square: float) -> float:
        """Return the weight of a client, in a rule whose weights depend on nobody else."""
        counts, squares = np.array([float(answer.images)]), np.array([square])
        seen = Measured((client,), counts, squares, np.empty((0, 0)))
        return float(self._rule(step).weigh(seen).factors[0])

    def _forge(self, step: Step, part: int) -> dict[str, Any]:
        """Make the updates of the clients that wait for the honest ones (part 0 makes all)."""
        number, trained = int(step["round"]), step["trained"]
        base = self._folder.read(number - 1, "weights")
        images = {int(client): count for client, count in step["images"].items()}
        answers = {
            client: Answer(
                np.load(self._folder.update(number, client)), images[client], 0, 0.0, Memory()
            )
            for client in trained
        }
        made = forged(self._liars(step), base, answers, images) if part == 0 else {}
        return {"clients": self._keep(step, base, made, None, None)}

    def _liars(self, step: Step) -> dict[int, Liar]:
        """Return the clients of the round that do not just train on their images."""
        config, number = self._config.adversary, int(step["round"])
        if config.name == "none" and config.honest_edge == 0:
            return {}
        change, pattern = None, step["pattern"]
        if config.adversary.needs_last_change and self._folder.has(number - 1, "change"):
            change = self._folder.read(number - 1, "change")
        return plan_liars(
            config,
            range(len(self._clients)),
            {int(client): count for client, count in step["images"].items()},
            seed=self._config.seed,
            round=number,
            classes=len(self._setting.manifest.classes),
            edge=self._edge,
            last_change=change,
            pattern=None if pattern is None else torch.from_numpy(np.load(Path(pattern))),
        )

    def _keep(
        self,
        step: Step,
        base: Weights,
        answers: Mapping[int, Answer],
        sums: ExactSum | None,
        controls: ExactSum | None,
    ) -> dict[str, dict[str, float]]:
        """Add the answers to the sums or store them; return the figures of those that are usable.

        The other clients are left out.
        """
        number, found = int(step["round"]), {}
        checks = self._added(step, base, answers, sums)
        for (client, answer), (reason, square) in zip(answers.items(), checks, strict=True):
            if reason is not None:
                self._folder.leave_out(number, client, reason)
                continue
            if sums is None or client == ROOT:
                write_array(self._folder.update(number, client), answer.weights)
            if controls is not None and answer.control_change is not None:
                controls.add(answer.control_change, 1.0)
            if self._config.keeps_memory:
                write_memory(self._folder.memory(client, number), answer.memory)
            if answer.pattern is not None:
                write_array(self._folder.pattern(number, client), answer.pattern.numpy())
            found[str(client)] = {
                "images": answer.images,
                "steps": answer.steps,
                "loss": answer.loss,
                "square": square,
            }
        return found

    def _added(
        self, step: Step, base: Weights, answers: Mapping[int, Answer], sums: ExactSum | None
    ) -> list[tuple[str | None, float]]:
        """Add the updates to ``sums``, if there are any; return the ``check`` of each."""
        updates = {client: each.weights for client, each in answers.items()}
        if sums is not None and self._rule(step).needs == "nothing":
            # The weight is the number of images, so one pass over the coordinates is enough.
            factors = [self._factor(step, c, each, math.nan) for c, each in answers.items()]
            return sums.add_changes(list(updates.values()), base, factors)
        checks = [check(update, base) for update in updates.values()]
        if sums is None:
            return checks
        usable = {
            client: self._factor(step, client, answers[client], square)
            for client, (reason, square) in zip(updates, checks, strict=True)
            if reason is None and client != ROOT
        }
        sums.add_changes([updates[client] for client in usable], base, list(usable.values()))
        return checks

    def _limit(self, number: int, client: int) -> Any:
        return nullcontext() if self._deadline is None else self._deadline.of(number, client)

    def _rule(self, step: Step) -> Rule:
        if self._known_rule is None:
            self._known_rule = self._config.rule_for(step["clients"])
        return self._known_rule

    def _control(self, number: int) -> Vector | None:
        if not self._config.scaffold or not self._folder.has(number - 1, "control"):
            return None
        return self._folder.read(number - 1, "control")

    def _memory(self, client: int, step: Step) -> Memory | None:
        if not self._config.keeps_memory:
            return None
        last = step["memory"].get(str(client))
        return None if last is None else read_memory(self._folder.memory(client, int(last)))

    def _rows(self, client: int) -> MappedSplit:
        if client == ROOT:
            return self._root
        return self._split.subset(self._clients[client])

    @cached_property
    def _network(self) -> Resident:
        manifest = self._setting.manifest
        shape = manifest.channels, manifest.height, manifest.width
        return Resident.prepared(new_network(self._config, manifest), shape, self._config)

    @cached_property
    def _statistics(self) -> Statistics:
        policy = self._config.batch_norm
        averages = policy == "average"
        model = new_network(self._config, self._setting.manifest) if averages else torch.nn.Module()
        return Statistics.of(model, policy)

    @cached_property
    def _split(self) -> MappedSplit:
        return MappedSplit(self._setting.shards, self._setting.manifest, "train")

    @cached_property
    def _root(self) -> MappedSplit:
        split = MappedSplit(self._setting.shards, self._setting.manifest, "val")
        count = min(self._config.root_images, len(split))
        key = derive(self._config.seed, "root")
        return split.subset(np.sort(permute(np.arange(count), len(split), key)))

    @cached_property
    def _edge(self) -> EdgeImages | None:
        return read_edge(self._folder.edge)

    @cached_property
    def _clients(self) -> ClientRows:
        return ClientRows(self._folder.path / "clients.npz")

    # --- aggregation ---

    def _measure(self, step: Step, part: int) -> dict[str, Any]:
        """Measure some chunks; the parts of each chunk are added on the driver, in order."""
        rule = self._rule(step)
        rows = StoredUpdates(self._folder, step, rule.references)
        found = []
        for here in chunks_within(step["slices"][part]):
            block = rows.measured(here) if rule.remembers else rows.updates(here)
            seen = measure(block, rows.references(here), rule.needs)
            found.append([seen.squares.tolist(), seen.products.tolist()])
        return {"chunks": found}

    def _combine(self, step: Step, part: int) -> dict[str, Any]:
        number, (start, stop) = int(step["round"]), step["slices"][part]
        rule = self._rule(step)
        weighing = _weighing(step["weighing"])
        rows = StoredUpdates(self._folder, step, rule.references)
        base = self._folder.read(number - 1, "weights", slice(start, stop))
        states = {
            name.removeprefix("state"): self._folder.read(number - 1, name, slice(start, stop))
            for name in self._folder.names(number - 1, "state")
        }
        weights = np.empty(stop - start, dtype=np.float32)
        changes = np.empty(stop - start if self._config.keeps_change else 0)
        kept: dict[str, Vector] = {}
        squares: list[float] = []
        for here in chunks_within((start, stop)):
            local = slice(here.start - start, here.stop - start)
            if step["adds_up"]:
                change = rows.summed("sum", here, weight=step["total"], over=weighing.divisor)
            else:
                change = rule.combine(rows.updates(here), weighing, rows.references(here))
            if weighing.noise > 0:
                change = change + weighing.noise * gaussian(self._config.seed, number, here)
            if self._config.keeps_change:
                changes[local] = change
            before = {name: values[local] for name, values in states.items()}
            moved, after = rule.step(change, before)
            change = self._statistics.averaged(moved, change, here)
            squares.append(squared_norm(change))
            weights[local] = self._statistics.apply(base[local], change, here)
            for name, values in after.items():
                kept.setdefault(name, np.empty(stop - start))[local] = values
        self._folder.write(number, "weights", part, weights)
        if self._config.keeps_change:
            self._folder.write(number, "change", part, changes)
        for name, values in kept.items():
            self._folder.write(number, f"state{name}", part, values)
        if self._config.scaffold:
            self._move_control(step, part, rows)
        if rule.remembers:
            rows.remember(step["slices"][part], part)
        return {"squares": squares}

    def _move_control(self, step: Step, part: int, rows: StoredUpdates) -> None:
        number, (start, stop) = int(step["round"]), step["slices"][part]
        before = self._control(number)
        moved = rows.summed("controls", slice(start, stop), weight=step["cohort"])
        control = moved / step["clients"] + (0.0 if before is None else before[start:stop])
        self._folder.write(number, "control", part, control)

    # --- evaluation ---

    def _evaluate(self, step: Step, part: int) -> dict[str, Any]:
        job = evaluation(self._setting.shards, step["job"])
        for piece in step["pieces"][part]:
            job.do(piece)
        return {}

    def _evaluate_own(self, step: Step, part: int) -> dict[str, Any]:
        job = evaluation(self._setting.shards, step["job"])
        clients = {client: step["clients"][client] for client in step["groups"][part]}
        for own in own_networks(self._folder, job, clients):
            own.work.mkdir(parents=True, exist_ok=True)
            own.do(0)
        return {}


def _weighing(document: Mapping[str, Any]) -> Weighing:
    references = document["references"]
    return Weighing(
        np.array(document["factors"], dtype=np.float64),
        float(document["divisor"]),
        references=None if references is None else np.array(references, dtype=np.float64),
        noise=float(document["noise"]),
    )
