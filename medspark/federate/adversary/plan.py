"""Plan the attack of a round: who is selected, who lies, and what each liar knows.

Everything is a pure function of the configuration, the clients, the seed and the round, so that a
task on any machine, or a resumed run, finds the same. The simulation of a round calls it so:

    edge = edge_set(config, manifest, seed=seed)       # once, in edge.py; None without tail images
    asked = selected(config, clients, per_round, seed=seed, round=round)
    liars = plan_liars(config, clients, {c: images[c] for c in asked}, seed=seed, round=round,
                       classes=len(manifest.classes), edge=edge and edge.train,
                       last_change=last_change, pattern=pattern)
    for client in asked:
        if waits(liars.get(client)):       # ALIE, IPM: they need no training
            continue
        answers[client] = train_client(..., liar=liars.get(client))
    answers |= forged(liars, weights, answers, images)

``last_change`` is ``RoundResult.change`` of the round before, which the adversary only gets if it
needs it. ``pattern`` is ``latest_pattern(answers)`` of the last round that gave one; a resumed run
has to restore both. Clients that are not in ``liars`` are honest and without edge images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from medspark.federate.adversary.adversary import Known, chosen
from medspark.federate.adversary.config import AdversaryConfig
from medspark.federate.adversary.edge_holder import EdgeHolder
from medspark.federate.aggregate.rule import Vector
from medspark.federate.client import Answer, Liar, Memory
from medspark.federate.edge import EdgeImages
from medspark.federate.round import cohort
from medspark.federate.weights import Weights, apply, difference
from medspark.seeding import derive

__all__ = [
    "forged", "holders", "latest_pattern", "malicious", "plan_liars", "selected",
    "waits",
]  # fmt: skip


def malicious(config: AdversaryConfig, clients: Sequence[int], *, seed: int) -> list[int]:
    """Return the sorted malicious clients: those that are named, or a share drawn by the seed."""
    if config.name == "none":
        return []
    if config.clients:
        return sorted(set(config.clients) & set(clients))
    numbers = sorted(clients)
    return [numbers[i] for i in chosen(len(numbers), config.share, derive(seed, "malicious"))]


def holders(config: AdversaryConfig, clients: Sequence[int], *, seed: int) -> list[int]:
    """Return the sorted honest clients that hold edge images under their true classes."""
    honest = sorted(set(clients) - set(malicious(config, clients, seed=seed)))
    drawn = chosen(len(honest), config.honest_edge, derive(seed, "edge holders"))
    return [honest[i] for i in drawn]


def selected(
    config: AdversaryConfig, clients: Sequence[int], per_round: int, *, seed: int, round: int
) -> list[int]:
    """Return the sorted clients of a round.

    In attacked rounds with a fixed number of malicious clients, these and the honest ones are drawn
    apart; if there are fewer malicious ones, honest clients fill the round.
    """
    if config.per_round is None or not config.attacks_in(round):
        return cohort(clients, per_round, seed=seed, round=round)
    liars = malicious(config, clients, seed=seed)
    drawn = cohort(liars, config.per_round, seed=seed, round=round)
    honest = sorted(set(clients) - set(liars))
    return sorted(drawn + cohort(honest, per_round - len(drawn), seed=seed, round=round))


def plan_liars(
    config: AdversaryConfig,
    clients: Sequence[int],
    images: Mapping[int, int],
    *,
    seed: int,
    round: int,
    classes: int,
    edge: EdgeImages | None = None,
    last_change: Vector | None = None,
    pattern: Tensor | None = None,
) -> dict[int, Liar]:
    """Return the ``Liar`` of each client of the round that does not just train on its images.

    ``images`` are the numbers of images of the round's clients, by client. Besides malicious
    clients, honest ones that hold edge images are in the result, each with an ``EdgeHolder``.
    """
    found: dict[int, Liar] = {}
    known = Known(
        clients=len(images),
        round=round,
        classes=classes,
        edge=None if edge is None else edge.images,
        edge_labels=None if edge is None else edge.labels,
    )
    holding = EdgeHolder(edge_images=config.honest_edge_images)
    for client in set(holders(config, clients, seed=seed)) & set(images):
        # The key does not depend on the round: a client holds the same images in all of them.
        found[client] = Liar(holding, replace(known, key=derive(seed, "edge holder", client)))
    if not config.attacks_in(round):
        return found
    everybody, total = malicious(config, clients, seed=seed), sum(images.values())
    present = [client for client in everybody if client in images]
    for client in present:
        knows = replace(
            known,
            key=derive(seed, "adversary", round, client),
            number=everybody.index(client),
            liars=len(present),
            share=images[client] / total,
            last_change=last_change if config.adversary.needs_last_change else None,
            pattern=pattern,
        )
        found[client] = Liar(config.adversary, knows)
    return found


def waits(liar: Liar | None) -> bool:
    """Return whether a client sends what it computes from the honest updates of the round."""
    return liar is not None and liar.adversary.needs_honest


def forged(
    liars: Mapping[int, Liar],
    weights: Weights,
    answers: Mapping[int, Answer],
    images: Mapping[int, int],
) -> dict[int, Answer]:
    """Return the answers of the clients that wait for the honest ones, made without training.

    ``answers`` are those of all others. If none of them is of use, there is nothing to forge, and
    the result is empty.
    """
    waiting = {client: liar for client, liar in sorted(liars.items()) if waits(liar)}
    fitting = [a.weights for _, a in sorted(answers.items()) if a.weights.shape == weights.shape]
    updates = [difference(trained, weights) for trained in fitting]
    finite = [update for update in updates if np.isfinite(update).all()]
    if not waiting or not finite:
        return {}
    honest, nothing = np.stack(finite), np.zeros(len(weights))
    return {
        client: Answer(
            apply(weights, liar.adversary.send(nothing, replace(liar.known, honest=honest))),
            images[client],
            steps=0,
            loss=0.0,
            memory=Memory(),
        )
        for client, liar in waiting.items()
    }


def latest_pattern(answers: Mapping[int, Answer]) -> Tensor | None:
    """Return the trigger that the malicious client of the smallest number prepared, if one did."""
    patterns = [answer.pattern for _, answer in sorted(answers.items())]
    return next((pattern for pattern in patterns if pattern is not None), None)
