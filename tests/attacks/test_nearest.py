"""Attacks for the nearest error, on networks of flat boundaries whose nearest error is known."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from medspark.attacks.boundary import Planes, nearby_planes, project_onto_plane
from medspark.attacks.carlini_wagner import carlini_wagner
from medspark.attacks.deepfool import deepfool
from medspark.attacks.fab import fab
from medspark.attacks.keyed_random import KeyedRandom
from medspark.attacks.square import square
from medspark.attacks.threat import Norm, ThreatModel, norms
from medspark.attacks.transfer import transfer

NORMS = get_args(Norm)
norm_names = st.sampled_from(NORMS)
LABELS = torch.zeros(3, dtype=torch.long)


class Flat(nn.Module):
    """Logits that are planes: 0 for the first class, and ``slopes`` of the others below it."""

    def __init__(self, slopes: Tensor, offset: float = 0.2) -> None:
        super().__init__()
        self.slopes, self.offset = slopes, offset

    def forward(self, images: Tensor) -> Tensor:
        shown = (images - 0.5).flatten(1) @ self.slopes.T.to(images.dtype) - self.offset
        return torch.cat([torch.zeros_like(shown[:, :1]), shown], dim=1)


def slopes(seed: int, classes: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(classes, 16, generator=generator, dtype=torch.float64)
    return drawn + drawn.sign()


def images(seed: int) -> Tensor:
    """Return three images that are right, and whose boundaries are far from the edges of [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return 0.498 + 0.004 * torch.rand(3, 1, 4, 4, generator=generator, dtype=torch.float64)


def nearest(network: Flat, clean: Tensor, norm: Norm) -> Tensor:
    """Return how far the nearest error is from each image (B,), far from the edges of [0, 1]."""
    ahead = -network(clean)[:, 1:]
    dual = network.slopes.abs().sum(1) if norm == "linf" else network.slopes.norm(dim=1)
    return (ahead / dual).amin(1)


def size(change: Tensor, norm: Norm) -> Tensor:
    return change.abs().flatten(1).amax(1) if norm == "linf" else norms(change).flatten()


@given(norm_names, st.integers(0, 500), st.integers(1, 5))
def test_deepfool_goes_straight_to_the_nearest_boundary_and_a_little_beyond(
    norm: Norm, seed: int, classes: int
) -> None:
    network, clean = Flat(slopes(seed, classes)), images(seed)

    found = deepfool(network, clean, LABELS, norm=norm)

    assert (network(found).argmax(1) != 0).all()
    ratio = size(found - clean, norm) / nearest(network, clean, norm)
    assert ((ratio > 1) & (ratio < 1.03)).all()


@given(norm_names, st.integers(0, 500))
def test_fab_ends_at_the_nearest_boundary(norm: Norm, seed: int) -> None:
    network, clean = Flat(slopes(seed, 3)), images(seed).float()

    found = fab(network, clean, LABELS, norm=norm, rng=KeyedRandom.for_whole(clean), steps=10)

    assert (network(found).argmax(1) != 0).all()
    ratio = size(found - clean, norm) / nearest(network, clean, norm)
    assert ((ratio > 1) & (ratio < 1.06)).all()


def test_fab_keeps_the_nearest_of_all_that_it_finds_from_further_starts_too() -> None:
    network, clean = Flat(slopes(0, 3)), images(0).float()
    rng = KeyedRandom.for_whole(clean)
    lengths = [
        size(
            fab(network, clean, LABELS, norm="linf", rng=rng, restarts=n, radius=0.3) - clean,
            "linf",
        )
        for n in (1, 3)
    ]

    assert (lengths[1] <= lengths[0] + 1e-9).all()


@pytest.mark.parametrize("norm", NORMS)
def test_fab_starts_again_at_half_the_radius_and_elsewhere_each_time(norm: Norm) -> None:
    class Watched(Flat):
        seen: list[Tensor] = []  # noqa: RUF012 - one test, one network

        def forward(self, images: Tensor) -> Tensor:
            self.seen.append(images.detach())
            return super().forward(images)

    network, clean = Watched(slopes(0, 2)), images(0).float()
    network.seen = []

    fab(
        network, clean, LABELS, norm=norm, rng=KeyedRandom.for_whole(clean),
        steps=1, restarts=3, radius=0.2,
    )  # fmt: skip

    first, second, third = network.seen[::2]
    assert torch.equal(first, clean)
    for start in (second, third):
        torch.testing.assert_close(size(start - clean, norm), torch.full((3,), 0.1))
    assert not torch.equal(second, third)


@pytest.mark.parametrize("seed", range(5))
def test_carlini_and_wagner_come_near_the_nearest_error(seed: int) -> None:
    network, clean = Flat(slopes(seed, 3)), images(seed).float()

    found = carlini_wagner(network, clean, LABELS, steps=200)

    assert (network(found).argmax(1) != 0).all()
    ratio = size(found - clean, "l2") / nearest(network, clean, "l2")
    assert ((ratio >= 1) & (ratio < 1.1)).all()


@given(norm_names, st.integers(0, 500))
def test_the_nearest_plane_is_the_one_that_takes_the_smallest_move(norm: Norm, seed: int) -> None:
    network, clean = Flat(slopes(seed, 5)), images(seed)

    value, gradient = nearby_planes(network, clean, LABELS).nearest(norm)

    dual = gradient.abs().flatten(1).sum(1) if norm == "linf" else norms(gradient).flatten()
    torch.testing.assert_close(value.abs() / dual, nearest(network, clean, norm))


def test_any_boundary_crossed_fools_and_beyond_counts_by_its_distance() -> None:
    gradients = torch.ones(2, 2, 1, 1, 1)
    planes = Planes(torch.tensor([[-3.0, 1.0], [-1.0, -2.0]]), gradients)

    assert planes.fooled.tolist() == [True, False]
    assert planes.nearest("linf")[0].tolist() == [1.0, -1.0]


@given(norm_names, st.integers(0, 500))
def test_the_point_of_a_plane_is_found_to_the_last_digits(norm: Norm, seed: int) -> None:
    clean = images(seed)
    gradient = slopes(seed, 3).view(3, 1, 4, 4)
    value = torch.tensor([-0.3, 0.2, -1e-3]).double()

    moved = project_onto_plane(clean, value, gradient, norm=norm) - clean

    torch.testing.assert_close((gradient * moved).flatten(1).sum(1), -value, rtol=0, atol=1e-6)
    shortest = value.abs() / (
        gradient.abs().flatten(1).sum(1) if norm == "linf" else norms(gradient).flatten()
    )
    torch.testing.assert_close(size(moved, norm), shortest, rtol=1e-3, atol=1e-7)


class Counted(nn.Module):
    """A network that is fooled if enough pixels are bright, and counts its calls."""

    def __init__(self, needed: float) -> None:
        super().__init__()
        self.needed, self.asked = needed, 0

    def forward(self, images: Tensor) -> Tensor:
        self.asked += len(images)
        bright = images.flatten(1).mean(1)
        return torch.stack([torch.full_like(bright, self.needed), bright], dim=1)


@pytest.mark.parametrize("queries", [10, 60])
def test_square_asks_as_often_as_it_may_and_only_gets_better(queries: int) -> None:
    network, clean = Counted(9.0), torch.full((2, 2, 8, 8), 0.5)

    found = square(
        network, clean, LABELS[:2], eps=0.1, rng=KeyedRandom.for_whole(clean), queries=queries
    )

    assert network.asked == 2 * queries
    change = (found - clean).abs()
    torch.testing.assert_close(change, torch.full_like(change, 0.1))  # every pixel goes all the way
    assert ((found - clean).flatten(1).mean(1) > 0).all()


def test_square_starts_with_stripes_from_top_to_bottom_and_moves_squares() -> None:
    seen: list[Tensor] = []

    class Watched(Counted):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images - 0.5)
            return super().forward(images)

    clean = torch.full((1, 1, 16, 16), 0.5)
    square(Watched(9.0), clean, LABELS[:1], eps=0.1, rng=KeyedRandom.for_whole(clean), queries=400)

    assert (seen[0] == seen[0][:, :, :1]).all()
    assert seen[0].unique().numel() == 2
    sides, best = [], seen[0]
    for tried in seen[1:]:
        moved = (tried != best)[0, 0]
        if tried.mean() > best.mean():
            best = tried
        rows, columns = moved.any(1).sum(), moved.any(0).sum()
        sides.append(int(max(rows, columns)))
    assert max(sides[:4]) > 8
    assert max(sides[-50:]) <= 3
    assert float(best.mean()) > 0.08


def test_transfer_keeps_the_first_image_that_fools_and_loses_none() -> None:
    clean = torch.full((3, 1, 4, 4), 0.5)
    towards, away = Flat(torch.ones(1, 16)), Flat(-torch.ones(1, 16))
    model = Counted(0.55)

    for order in ((towards, away), (away, towards)):
        found = transfer(
            model, clean, LABELS, threat=ThreatModel(eps=0.1), surrogates=order, steps=5
        )
        assert (found.mean((1, 2, 3)) > 0.55).all()
