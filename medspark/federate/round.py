"""Pure functions of one federated round: select the cohort, check and aggregate its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    only on the answers of the counted clients.
    """

    weights: Weights
    change: Vector
    counted: tuple[int, ...]
    left_out: dict[int, str]
    rejected: frozenset[int] | None
    factors: dict[int, float]
    state: dict[str, Vector]


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
    state: State | None = None,
    seed: int = 0,
    round: int = 0,
) -> RoundResult:
    """Aggregate ``answers`` to ``weights`` (d,) and return the result.

    ``failed`` maps the clients that did not answer to the reason. ``counts`` replace the clients'
    numbers of images, as in SFAT. Answers with a wrong shape or with unusable numbers are left out.
    Raises RunError if fewer than ``least`` answers remain.
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
    outcome = aggregate(
        rule,
        np.stack([*updates.values()]) if updates else np.empty((0, len(weights))),
        counts=[(counts or {}).get(client, answers[client].images) for client in updates],
        clients=list(updates),
        references=references,
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


def _misfit(weights: Weights, answer: Answer) -> str | None:
    if answer.weights.shape != weights.shape:
        return f"the answer has shape {answer.weights.shape} instead of {weights.shape}"
    return fault(difference(answer.weights, weights))


def _first_of(left_out: Mapping[int, str]) -> str:
    if not left_out:
        return "No client was left out."
    client = min(left_out)
    return f"Client {client} was left out: {left_out[client]}."
