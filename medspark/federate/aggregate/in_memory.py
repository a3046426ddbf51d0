"""Aggregate updates that fit into memory, with the same steps as for updates in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from medspark.errors import RunError
from medspark.federate.aggregate.exact import fault
from medspark.federate.aggregate.measure import chunks, measure, total
from medspark.federate.aggregate.noise import gaussian
from medspark.federate.aggregate.rule import Matrix, Measured, Rule, State, Vector, Weighing

__all__ = ["Aggregate", "aggregate"]

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Aggregate:
    """The outcome of one aggregation.

    ``change`` (d,) is added to the weights. ``left_out`` maps each client with an unusable update
    to the reason. ``factors`` are the weights of the other clients, 1 on average; coordinate-wise
    rules ignore them. ``rejected`` are the clients that a detecting rule rejects; it is None for
    other rules. ``state`` is the next state of the server optimiser.
    """

    change: Vector
    factors: dict[int, float]
    rejected: frozenset[int] | None
    left_out: dict[int, str]
    state: dict[str, Vector] = field(default_factory=dict)


def aggregate(
    rule: Rule,
    updates: Floats,
    *,
    counts: Sequence[float] | None = None,
    clients: Sequence[int] | None = None,
    references: Mapping[str, Floats] | None = None,
    history: Floats | None = None,
    state: State | None = None,
    seed: int = 0,
    round: int = 0,
) -> Aggregate:
    """Aggregate ``updates`` (n, d) by ``rule``; the order of the rows changes nothing.

    ``counts`` (n,) are the clients' numbers of images, equal by default. ``clients`` are the
    clients' own numbers, 0 to n - 1 by default. ``references`` are the vectors (d,) that the rule
    names, zero by default. ``history`` (n, d) is the sum of each client's earlier updates.
    ``state`` is the state after the previous round. Raises RunError if no update is usable, and
    UsageError if the usable ones are too few for the rule.
    """
    numbers = list(range(len(updates))) if clients is None else list(clients)
    faults = {number: fault(row) for number, row in zip(numbers, updates, strict=True)}
    order = [i for i in np.argsort(numbers) if faults[numbers[i]] is None]
    left_out = {number: reason for number, reason in sorted(faults.items()) if reason is not None}
    if not order and rule.least > 0:
        raise RunError("No client sent a usable update.")
    rule.check(len(order))
    rows = _Rows(rule, updates, history, references or {}, order)
    seen = _look(
        rule,
        rows,
        clients=tuple(numbers[i] for i in order),
        counts=np.ones(len(order)) if counts is None else np.asarray(counts, np.float64)[order],
        seed=seed,
        round=round,
    )
    weighing = rule.weigh(seen)
    changes, states = [], []
    for here in chunks(updates.shape[1]):
        change = rule.combine(rows.updates(here), weighing, rows.references(here))
        if weighing.noise > 0:
            change = change + weighing.noise * gaussian(seed, round, here)
        remembered = {name: values[here] for name, values in (state or {}).items()}
        change, kept = rule.step(change, remembered)
        changes.append(change)
        states.append(kept)
    return Aggregate(
        change=np.concatenate(changes),
        factors=_factors(seen, weighing),
        rejected=_rejected(seen, weighing),
        left_out=left_out,
        state={name: np.concatenate([part[name] for part in states]) for name in states[0]},
    )


@dataclass(frozen=True)
class _Rows:
    """The rows of one aggregation in the order of the clients, read as float64 chunks."""

    rule: Rule
    all_updates: Floats
    history: Floats | None
    given: Mapping[str, Floats]
    order: list[int]

    @property
    def length(self) -> int:
        return int(self.all_updates.shape[1])

    def updates(self, here: slice) -> Matrix:
        return self.all_updates[self.order, here].astype(np.float64)

    def measured(self, here: slice) -> Matrix:
        rows = self.updates(here)
        if self.rule.remembers and self.history is not None:
            rows += self.history[self.order, here]
        return rows

    def references(self, here: slice) -> Matrix:
        nothing = np.zeros(self.length)
        rows = [self.given.get(name, nothing)[here] for name in self.rule.references]
        return np.array(rows, dtype=np.float64).reshape(len(rows), here.stop - here.start)


def _look(
    rule: Rule, rows: _Rows, *, clients: tuple[int, ...], counts: Vector, seed: int, round: int
) -> Measured:
    part = total(
        [
            measure(rows.measured(here), rows.references(here), rule.needs)
            for here in chunks(rows.length)
        ]
    )
    return Measured(clients, counts, part.squares, part.products, seed, round)


def _factors(seen: Measured, weighing: Weighing) -> dict[int, float]:
    factors = len(seen.clients) * weighing.factors / weighing.divisor
    return dict(zip(seen.clients, factors.tolist(), strict=True))


def _rejected(seen: Measured, weighing: Weighing) -> frozenset[int] | None:
    if weighing.rejected is None:
        return None
    return frozenset(np.array(seen.clients)[weighing.rejected].tolist())
