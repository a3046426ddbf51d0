"""The part of a worker in training: train some clients of a round, and add up their updates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medspark.data.native import MappedSplit
from medspark.errors import MedsparkError
from medspark.federate.adversary.plan import forged, plan_liars, waits
from medspark.federate.aggregate.exact import ExactSum, check
from medspark.federate.aggregate.rule import Measured, Rule
from medspark.federate.client import Answer, Liar, Memory, Task
from medspark.federate.edge import EdgeImages
from medspark.federate.folder import Overwriting, write_array
from medspark.federate.guard import Deadline, Progress
from medspark.federate.resident import Resident
from medspark.federate.setting import Setting, Step
from medspark.federate.stored import (
    ROOT,
    ClientRows,
    read_control,
    read_edge,
    read_memory,
    write_memory,
)
from medspark.federate.vectorised import Vectorised
from medspark.federate.weights import Weights
from medspark.redact import safe_text
from medspark.seeding import derive
from medspark.shards.plan import permute

__all__ = ["Training"]

# Answers of so many bytes are held, to be added together.
_HELD_BYTES = 1 << 27

# A client that was being trained when a task died, so often, is left out.
_DEATHS = 2


class Training:
    """Does parts of the steps ``train`` and ``forge``, which share out clients."""

    def __init__(self, setting: Setting, deadline: Deadline | None) -> None:
        self._setting, self._config, self._folder = setting, setting.config, setting.folder
        self._deadline = deadline
        self._sums = Overwriting()
        self._vectorised: dict[int, Vectorised] = {}

    def train(self, step: Step, part: int) -> dict[str, Any]:
        """Train the clients of a part; add up their updates, or store them as files."""
        number, group = int(step["round"]), [int(client) for client in step["groups"][part]]
        base = self._folder.read(number - 1, "weights")
        control = read_control(self._folder, number) if self._config.scaffold else None
        sums = ExactSum(len(base), weight=step["total"]) if step["adds_up"] else None
        controls = ExactSum(len(base), weight=step["cohort"]) if self._config.scaffold else None
        progress = Progress(self._folder, number, part)
        left_out, liars = self._folder.left_out(number), self._liars(step)
        # Before the first client, so that its deadline does not count the preparations.
        self._network, self._split, self._clients  # noqa: B018
        task = Task(base, number, self._config.seed, control, self._config.rounds)
        trained: dict[str, dict[str, float]] = {}
        answers: dict[int, Answer] = {}
        for bundle in _bundles(group, step["together"][part]):
            able = [
                client
                for client in bundle
                if client not in left_out
                and not waits(liars.get(client))
                and self._survives(number, client, progress)
            ]
            # Those that were trained when a task died train alone, to show who ends it.
            alone = len(bundle) == 1 or any(map(progress.deaths, able))
            for clients in [[client] for client in able] if alone else filter(None, [able]):
                with progress.of(*clients), self._limit(number, clients):
                    found = self._answers(task, clients, bundle, step, liars)
                for client, answer in found.items():
                    if isinstance(answer, str):
                        self._folder.leave_out(number, client, answer)
                    else:
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

    def _survives(self, number: int, client: int, progress: Progress) -> bool:
        """Return whether ``client`` may train; it is left out if tasks died while it did."""
        if progress.deaths(client) < _DEATHS:
            return True
        reason = f"its task died {_DEATHS} times while training it"
        self._folder.leave_out(number, client, reason)
        return False

    def _answers(
        self,
        task: Task,
        clients: Sequence[int],
        bundle: Sequence[int],
        step: Step,
        liars: Mapping[int, Liar],
    ) -> dict[int, Answer | str]:
        """Return the answer of each of ``clients``, or why it is left out."""
        try:
            if len(bundle) > 1:
                return self._at_once(task, clients, bundle)
            (client,) = clients
            answer = self._setting.train(
                self._network,
                self._rows(client),
                task,
                self._config,
                augmentation=self._config.augment,
                memory=self._memory(client, step),
                liar=liars.get(client),
            )
        except Exception as error:  # noqa: BLE001 - one client's failure is not the round's
            if len(clients) == 1:
                return {clients[0]: _reason(error)}
            one_by_one = [self._answers(task, [c], bundle, step, liars) for c in clients]
            return {client: each for found in one_by_one for client, each in found.items()}
        if answer.weights.shape != task.weights.shape:
            shape = answer.weights.shape
            return {client: f"the answer has shape {shape} instead of {task.weights.shape}"}
        return {client: answer}

    def _at_once(
        self, task: Task, clients: Sequence[int], bundle: Sequence[int]
    ) -> dict[int, Answer | str]:
        """Train the ``clients`` of a bundle at once, each in its own lane.

        Other lanes train the images of one of them: bits depend on a client's lane, not on others.
        """
        lanes = len(bundle)
        if lanes not in self._vectorised:
            self._vectorised[lanes] = Vectorised.of(self._network.own, lanes)
        found = self._vectorised[lanes].train(
            self._split,
            [self._clients[client if client in clients else clients[0]] for client in bundle],
            task,
            self._config,
            augmentation=self._config.augment,
        )
        return {c: answer for c, answer in zip(bundle, found, strict=True) if c in clients}

    def forge(self, step: Step, part: int) -> dict[str, Any]:
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
        rule = self._config.rule_for(step["clients"])
        if sums is not None and rule.needs == "nothing":
            # The weight is the number of images, so one pass over the coordinates is enough.
            factors = [_factor(rule, c, each, math.nan) for c, each in answers.items()]
            return sums.add_changes(list(updates.values()), base, factors)
        checks = [check(update, base) for update in updates.values()]
        if sums is None:
            return checks
        usable = {
            client: _factor(rule, client, answers[client], square)
            for client, (reason, square) in zip(updates, checks, strict=True)
            if reason is None and client != ROOT
        }
        sums.add_changes([updates[client] for client in usable], base, list(usable.values()))
        return checks

    def _limit(self, number: int, clients: Sequence[int]) -> Any:
        return nullcontext() if self._deadline is None else self._deadline.of(number, clients)

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
        return Resident.prepared(self._setting.network(), shape, self._config)

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


def _bundles(group: Sequence[int], together: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield the bundles of clients that train at once; every other client alone."""
    yield from map(list, together)
    bundled = {client for bundle in together for client in bundle}
    yield from ([client] for client in group if client not in bundled)


def _reason(error: Exception) -> str:
    """Return the error of a client as a clause of a sentence."""
    if isinstance(error, MedsparkError):
        return safe_text(str(error)).rstrip(".")
    return safe_text(f"{type(error).__name__}: {error}").splitlines()[0].rstrip(".")


def _factor(rule: Rule, client: int, answer: Answer, square: float) -> float:
    """Return the weight of a client, in a rule whose weights depend on nobody else."""
    counts, squares = np.array([float(answer.images)]), np.array([square])
    seen = Measured((client,), counts, squares, np.empty((0, 0)))
    return float(rule.weigh(seen).factors[0])
