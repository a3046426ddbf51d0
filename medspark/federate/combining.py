"""The part of a worker in an aggregation: measure and combine some coordinates of all updates."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch

from medspark.federate.aggregate.exact import squared_norm
from medspark.federate.aggregate.measure import measure
from medspark.federate.aggregate.noise import gaussian
from medspark.federate.aggregate.rule import Vector, Weighing
from medspark.federate.setting import Setting, Step
from medspark.federate.stored import StoredUpdates, chunks_within, read_control
from medspark.federate.weights import Statistics

__all__ = ["Combining"]


class Combining:
    """Does parts of the steps ``measure`` and ``combine``, which share out coordinates."""

    def __init__(self, setting: Setting) -> None:
        self._setting, self._config, self._folder = setting, setting.config, setting.folder

    def measure(self, step: Step, part: int) -> dict[str, Any]:
        """Measure some chunks; the parts of each chunk are added on the driver, in order."""
        rule = self._config.rule_for(step["clients"])
        rows = StoredUpdates(self._folder, step, rule.references)
        found = []
        for here in chunks_within(step["slices"][part]):
            block = rows.measured(here) if rule.remembers else rows.updates(here)
            seen = measure(block, rows.references(here), rule.needs)
            found.append([seen.squares.tolist(), seen.products.tolist()])
        return {"chunks": found}

    def combine(self, step: Step, part: int) -> dict[str, Any]:
        """Write the weights of some coordinates after the round, and what the next one needs."""
        number, (start, stop) = int(step["round"]), step["slices"][part]
        rule = self._config.rule_for(step["clients"])
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
        before = read_control(self._folder, number)
        moved = rows.summed("controls", slice(start, stop), weight=step["cohort"])
        control = moved / step["clients"] + (0.0 if before is None else before[start:stop])
        self._folder.write(number, "control", part, control)

    @cached_property
    def _statistics(self) -> Statistics:
        policy = self._config.batch_norm
        model = self._setting.network() if policy == "average" else torch.nn.Module()
        return Statistics.of(model, policy)


def _weighing(document: Mapping[str, Any]) -> Weighing:
    references = document["references"]
    return Weighing(
        np.array(document["factors"], dtype=np.float64),
        float(document["divisor"]),
        references=None if references is None else np.array(references, dtype=np.float64),
        noise=float(document["noise"]),
    )
