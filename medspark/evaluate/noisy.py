"""Judge a network with noisy weights: with its noise, without it, and attacked across.

A gradient through noisy weights is random, and attacks that follow one draw of it are weak. What
such a network seems to gain is partly that: masked gradients (Athalye et al. 2018). So the network
is attacked by PGD, by PGD that averages over draws (EOT), and by images that PGD finds without the
noise; and without noise, by PGD and by the images of EOT. All are always reported together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from medspark.attacks.eot import eot_pgd
from medspark.attacks.keyed_random import KeyedRandom
from medspark.attacks.losses import correct
from medspark.attacks.pgd import pgd
from medspark.attacks.threat import ThreatModel
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.noise_result import NoiseResult
from medspark.evaluate.robust import Array, Batch, Gather
from medspark.evaluate.sanity import PROBED_IMAGES
from medspark.evaluate.summary import Arrays
from medspark.models.noisy import silent
from medspark.seeding import derive

__all__ = ["DRAWS", "judge_noise", "judged_rows", "noise_arrays", "noise_result"]

# Passes with noise of their own: averaged in a step of EOT, and as repeated answers to an image.
DRAWS = 10


def judge_noise(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    threat: ThreatModel,
    steps: int,
    seed: int,
    gather: Gather | None = None,
) -> NoiseResult:
    """Return the figures of ``model``, whose noisy layers are active, on ``batches``.

    ``gather`` concatenates an array of all ranks along its first axis.
    """
    arrays = noise_arrays(model, batches, threat=threat, steps=steps, seed=seed)
    if gather is not None:
        arrays = {name: gather(values) for name, values in arrays.items()}
    return noise_result(arrays, threat=threat, steps=steps)


def judged_rows(config: AttackSettings, total: int) -> Array:
    """Return the rows to judge, out of ``total`` images.

    Those that the sanity probes take; without probes, as many as they take by default.
    """
    return np.sort(config.rows(total))[: config.sanity_images or PROBED_IMAGES]


def noise_arrays(
    model: nn.Module, batches: Iterable[Batch], *, threat: ThreatModel, steps: int, seed: int
) -> Arrays:
    """Return ``rows`` (N,), and by condition whether each answer is right: (N, draws), or (N, 1).

    The draws depend on ``seed`` and the rows of a batch.
    """
    parts: dict[str, list[Array]] = defaultdict(list)
    for images, labels, rows in batches:
        with torch.random.fork_rng():
            torch.manual_seed(derive(seed, "weight noise", int(rows[0])))
            for name, right in _answers(model, images, labels, rows, threat, steps, seed).items():
                parts[name].append(right.cpu().numpy())
        parts["rows"].append(rows.numpy())
    return {name: np.concatenate(part) for name, part in parts.items()}


def noise_result(arrays: Arrays, *, threat: ThreatModel, steps: int) -> NoiseResult:
    """Return the figures of what ``noise_arrays`` returned; repeated images count once."""
    _, once = np.unique(arrays["rows"], return_index=True)
    right = {name: values[once] for name, values in arrays.items() if name != "rows"}
    shares = {name: values.mean(1) for name, values in right.items()}
    worst = np.minimum.reduce([shares[name] for name in ("pgd", "eot", "transfer")])
    unmoved = np.minimum(shares["silent_pgd"], shares["silent_transfer"])
    return NoiseResult(
        images=len(once),
        draws=DRAWS,
        steps=steps,
        eps=threat.eps,
        clean_deviation=float(right["clean"].mean(0).std()),
        worst=float(worst.mean()),
        silent_worst=float(unmoved.mean()),
        **{name: float(share.mean()) for name, share in shares.items()},
    )


def _answers(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    rows: Tensor,
    threat: ThreatModel,
    steps: int,
    seed: int,
) -> dict[str, Tensor]:
    """Return whether the answers are right, by condition: (B, draws), or (B, 1) without noise."""
    start = threat.random_start(images, KeyedRandom(seed, rows).noise(images, "pgd/0"))

    def attack(how: Callable[..., Tensor], **more: int) -> Tensor:
        return how(model, images, labels, threat=threat, steps=steps, start=start, **more)

    with silent(model):
        found = attack(pgd)
    followed, expected = attack(pgd), attack(eot_pgd, draws=DRAWS)
    noisy = {"clean": images, "pgd": followed, "eot": expected, "transfer": found}
    quiet = {"silent_clean": images, "silent_pgd": found, "silent_transfer": expected}
    right = {name: _right(model, seen, labels, DRAWS) for name, seen in noisy.items()}
    with silent(model):
        return right | {name: _right(model, seen, labels, 1) for name, seen in quiet.items()}


@torch.no_grad()
def _right(model: nn.Module, images: Tensor, labels: Tensor, draws: int) -> Tensor:
    return torch.stack([correct(model(images), labels) for _ in range(draws)], dim=1)
