"""Our rules beside Flower's and ByzFL's on the same arrays, and how those differ from the papers.

Flower does not install beside the tested set, so this is no part of the suite. In an environment
with flwr 1.41, byzfl 0.0.11, hypothesis, pytest and what medspark.config needs:

    PYTHONPATH=. pytest --noconftest -c /dev/null tests/federate/compare_with_others.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from medspark.federate.aggregate import RULES, aggregate

pytest.importorskip("flwr", reason="flwr is not installed here")
byzfl = pytest.importorskip("byzfl", reason="byzfl is not installed here")

from flwr.common import FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays  # noqa: E402
from flwr.server.strategy import FedAdam, FedAvgM, FedYogi  # noqa: E402
from flwr.server.strategy import aggregate as flower  # noqa: E402

Array = np.ndarray[Any, Any]
DRAWS = range(200)


def drawn(seed: int, *, clients: int = 11, length: int = 20) -> Array:
    """Return updates, of which the first three are far away from the others."""
    draw = np.random.default_rng(seed)
    updates = 1 + draw.normal(size=(clients, length))
    updates[:3] += 5 * draw.normal(size=(3, length))
    return updates


def ours(name: str, updates: Array, **settings: Any) -> Array:
    return aggregate(RULES[name](**settings), updates).change


def results(updates: Array) -> list[tuple[list[Array], int]]:
    return [([row], 1) for row in updates]


AGREE: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "fedavg, flower": (
        lambda u: ours("fedavg", u),
        lambda u: flower.aggregate(results(u))[0],
    ),
    "median, flower": (
        lambda u: ours("median", u),
        lambda u: flower.aggregate_median(results(u))[0],
    ),
    "median, byzfl": (lambda u: ours("median", u), lambda u: byzfl.Median()(u)),
    "trimmed mean, flower": (
        lambda u: ours("trimmed_mean", u, trim=0.2),
        lambda u: flower.aggregate_trimmed_avg(results(u), 0.2)[0],
    ),
    "trimmed mean, byzfl": (
        lambda u: ours("trimmed_mean", u, trim=3 / 11),
        lambda u: byzfl.TrMean(f=3)(u),
    ),
    "krum, flower": (
        lambda u: ours("krum", u, adversaries=3),
        lambda u: flower.aggregate_krum(results(u), 3, 0)[0],
    ),
    "krum, byzfl": (
        lambda u: ours("krum", u, adversaries=3, convention="allouah"),
        lambda u: byzfl.Krum(f=3)(u),
    ),
    "multi-krum, flower": (
        lambda u: ours("multi_krum", u, adversaries=3),
        lambda u: flower.aggregate_krum(results(u), 3, 6)[0],
    ),
    "multi-krum, byzfl": (
        lambda u: ours("multi_krum", u, adversaries=3, convention="allouah"),
        lambda u: byzfl.MultiKrum(f=3)(u),
    ),
    "bulyan, flower": (
        lambda u: ours("bulyan", u, adversaries=2),
        lambda u: flower.aggregate_bulyan(results(u), 2, flower.aggregate_krum, to_keep=0)[0],
    ),
    "geometric median, byzfl converged": (
        lambda u: ours("rfa", u),
        lambda u: byzfl.GeometricMedian(nu=1e-6, T=3000)(u),
    ),
    "centered clipping, byzfl": (
        lambda u: ours("centered_clipping", u, bucket=1, radius=3.0, iterations=4),
        lambda u: byzfl.CenteredClipping(L=4, tau=3.0)(u),
    ),
    "norm clipping, byzfl": (
        lambda u: ours("norm_clipping", u, bound=2.0),
        lambda u: byzfl.Average()(byzfl.Clipping(c=2.0)(u)),
    ),
}


@pytest.mark.parametrize("pair", AGREE)
def test_the_rules_agree(pair: str):
    mine, theirs = AGREE[pair]
    draws = DRAWS if "converged" not in pair else DRAWS[:5]

    apart = [float(np.abs(mine(drawn(s)) - theirs(drawn(s))).max()) for s in draws]

    assert sum(a > 1e-6 for a in apart) == 0, (sum(a > 1e-6 for a in apart), max(apart))


def test_the_two_conventions_of_krum_differ_in_some_draws():
    picks = [
        not np.array_equal(
            ours("krum", drawn(s), adversaries=3),
            ours("krum", drawn(s), adversaries=3, convention="allouah"),
        )
        for s in DRAWS
    ]
    print(f"Krum's conventions pick different clients in {sum(picks)} of {len(picks)} draws")
    assert 0 < sum(picks) < len(picks)


def test_three_steps_of_byzfls_geometric_median_have_not_converged():
    apart = np.abs(ours("rfa", drawn(0)) - byzfl.GeometricMedian()(drawn(0))).max()
    print(f"ByzFL's default geometric median is off by {apart:.3g}")
    assert apart > 1e-4


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("fedavgm", FedAvgM, {"server_learning_rate": 0.5, "server_momentum": 0.8}),
        ("fedadam", FedAdam, {"eta": 0.1, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3}),
        ("fedyogi", FedYogi, {"eta": 0.1, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3}),
    ],
)
def test_the_server_optimisers_differ_from_flowers_by_what_is_told(
    name: str, kind: Any, settings: dict[str, float]
):
    """Print the largest gap over four rounds: Flower corrects Adam's bias and starts v at 0."""
    weights = np.zeros(20)
    theirs = kind(initial_parameters=ndarrays_to_parameters([weights]), **settings)
    rule = RULES[name](
        **{"fedavgm": {"rate": 0.5, "momentum": 0.8}}.get(name, {"rate": 0.1}),
    )
    mine, state, gap = weights, None, []
    for round in range(1, 5):
        updates = 0.01 * drawn(round)
        outcome = aggregate(rule, updates, state=state)
        mine, state = mine + outcome.change, outcome.state
        sent = [
            (None, FitRes(Status(0, ""), ndarrays_to_parameters([weights + u]), 1, {}))
            for u in updates
        ]
        answer, _ = theirs.aggregate_fit(round, sent, [])
        (weights,) = parameters_to_ndarrays(answer)
        gap.append(float(np.abs(mine - weights).max()))
    print(f"{name}: gaps {', '.join(f'{g:.2g}' for g in gap)}; moved {np.abs(mine).max():.2g}")
    assert name != "fedavgm" or max(gap) < 1e-9
