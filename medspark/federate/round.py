"""Pure functions of one federated round: select the cohort, check and aggregate its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from medspark.errors import RunError
from medspark.federate.aggregate import Rule, aggregate, fault
from medspark.federate.aggregate.exact import weighted_sum
from medspark.federate.aggregate.rule import State, Vector
from medspark.federate.client import Answer
from medspark.federate.weights import Weights, apply, difference
from medspark.seeding import derive, hash64

__all__ = ["RoundResult", "cohort", "finish_round", "next_control"]


@dataclass(frozen=True)
class RoundResult:
    """The result of a round.

    ``weights`` (d,) are the weights of the next round, ``change`` (d,) is their change. ``counted``
    are the clients whose update was aggregated. ``left_out`` maps the other selected clients to the
    reason. ``rejected`` are the counted clients that a detecting rule rejected. The result depends
    only on the answers of the counted clients. ``history`` holds, for a rule that remembers, the
    sums (d,) of all updates that each counted client has sent so far; it is empty for other rules.
    """

    weights: Weights
    change: Vector
    counted: tuple[int, ...]
    left_out: dict[int, str]
    rejected: frozenset[int] | None
    factors: dict[int, float]
    state: dict[str, Vector]
    history: dict[int, Vector] = field(default_factory=dict)


def cohort(clients: Sequence[int], per_round: int, *, seed: int, round: int) -> list[int]:
    """Return the ``per_round`` clients of a round, sorted; all clients if there are fewer.

    Every client draws a number from (seed, round); the smallest numbers are selected. So the order
    of two clients does not depend on the other clients.
    """
    numbers = np.array(sorted(clients), dtype=np.int64)
    drawn = hash64(derive(seed, "round", round), numbers)
    return sorted(numbers[np.argsort(drawn, kind="stable")[:per_round]].tolist())


def finish_round(
    weights: Weights,
    answers: Mapping[int, Answer],
    rule: Rule,
    *,
    least: int,
    failed: Mapping[int, str] | None = None,
    counts: Mapping[int, float] | None = None,
    references: Mapping[str, Vector] | None = None,
    history: Mapping[int, Vector] | None = None,
    state: State | None = None,
    seed: int = 0,
    round: int = 0,
) -> RoundResult:
    """Aggregate ``answers`` to ``weights`` (d,) and return the result.

    ``failed`` are the clients that did not answer, each with the reason. ``counts`` replace the
    clients' numbers of images, as in SFAT. Answers of the wrong shape or with unusable numbers are
    left out. Raises RunError if fewer than ``least`` answers remain.

    A rule that remembers (FoolsGold) needs ``history``, the ``RoundResult.history`` of the clients'
    last rounds; zero for clients that are not in it. One vector of doubles is kept for each client
    ever seen, and a round reads and replaces those of its own clients: keep them as one file for
    each client, and memory does not grow with the clients.
    """
    left_out, updates = dict(failed or {}), {}
    for client, answer in sorted(answers.items()):
        reason = _misfit(weights, answer)
        if reason is None:
            updates[client] = difference(answer.weights, weights)
        else:
            left_out[client] = reason
    if len(updates) < least:
        raise RunError(
            f"Round {round} needs {least} usable answers and has {len(updates)}. "
            f"{_first_of(left_out)}"
        )
    before = _sums(updates, history or {}) if rule.remembers else {}
    outcome = aggregate(
        rule,
        np.stack([*updates.values()]) if updates else np.empty((0, len(weights))),
        counts=[(counts or {}).get(client, answers[client].images) for client in updates],
        clients=list(updates),
        references=references,
        history=np.stack([*before.values()]) if before else None,
        state=state,
        seed=seed,
        round=round,
    )
    return RoundResult(
        weights=apply(weights, outcome.change),
        change=outcome.change,
        counted=tuple(updates),
        left_out=left_out,
        rejected=outcome.rejected,
        factors=outcome.factors,
        state=outcome.state,
        history={client: before[client] + updates[client] for client in before},
    )


def next_control(control: Vector, answers: Sequence[Answer], clients: int) -> Vector:
    """Return SCAFFOLD's server control (d,) after a round: c + sum of changes / ``clients``.

    ``answers`` are the answers of the counted clients.
    """
    changes = [a.control_change for a in answers if a.control_change is not None]
    moved: Vector = control.copy()
    if changes:
        moved += weighted_sum(np.stack(changes), np.ones(len(changes))) / clients
    return moved


def _sums(updates: Mapping[int, Vector], history: Mapping[int, Vector]) -> dict[int, Vector]:
    """Return the sums (d,) of what the clients sent before; zero for clients that sent nothing."""
    return {c: history.get(c, np.zeros_like(update)) for c, update in updates.items()}


def _misfit(weights: Weights, answer: Answer) -> str | None:
    if answer.weights.shape != weights.shape:
        return f"the answer has shape {answer.weights.shape} instead of {weights.shape}"
    return fault(difference(answer.weights, weights))


def _first_of(left_out: Mapping[int, str]) -> str:
    if not left_out:
        return "No client was left out."
    client = min(left_out)
    return f"Client {client} was left out: {left_out[client]}."
