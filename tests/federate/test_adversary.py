"""Each adversary does what its paper says, on small arrays."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from draws import honest, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from medspark.errors import UsageError
from medspark.federate.adversary import ADVERSARIES, Known
from medspark.federate.adversary.a3fl import A3FL
from medspark.federate.adversary.alie import Alie
from medspark.federate.adversary.badnets import BadNets
from medspark.federate.adversary.dba import DistributedBackdoor
from medspark.federate.adversary.edge_case import EdgeCase, Projected, Replacement
from medspark.federate.adversary.ipm import InnerProduct
from medspark.federate.adversary.label_flip import LabelFlip
from medspark.federate.adversary.neurotoxin import Neurotoxin
from medspark.federate.adversary.not_a_number import NotANumber
from medspark.federate.adversary.sign_flip import SignFlip
from medspark.federate.aggregate import RULES, aggregate


def images(count: int = 16, side: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return (
        torch.rand(count, 1, side, side, generator=draw) * 0.5,
        torch.arange(count) % 3,
    )


EDGE = Known(edge=torch.ones(5, 1, 8, 8), share=0.25)


@pytest.mark.parametrize("name", ADVERSARIES)
def test_no_adversary_changes_what_it_is_given(name: str):
    x, y = images()
    kept, update = (x.clone(), y.clone()), np.ones(4)
    known = Known(edge=torch.ones(2, 1, 8, 8), last_change=np.arange(4.0))
    adversary = ADVERSARIES[name]()

    adversary.poison(x, y, known)
    adversary.send(adversary.constrain(update, known), known)

    assert torch.equal(x, kept[0])
    assert torch.equal(y, kept[1])
    assert update.tolist() == [1.0] * 4


def test_edge_images_join_some_clean_ones_under_the_target():
    x, y = images()

    found, labels = EdgeCase(target=2, clean_images=6, edge_images=4).poison(x, y, EDGE)

    assert len(found) == len(labels) == 10
    assert (found[6:] == 1).all()
    assert (labels[6:] == 2).all()
    assert all(any(torch.equal(a, b) for b in x) for a in found[:6])


def test_an_edge_case_without_edge_images_is_refused():
    with pytest.raises(UsageError, match="edge images"):
        EdgeCase().poison(*images(), Known())


@given(seeds, st.floats(0.01, 100))
def test_projection_is_the_nearest_update_within_the_radius(seed: int, size: float):
    update = size * np.random.default_rng(seed).normal(size=7)

    found = Projected(radius=1.5).constrain(update, Known())

    assert np.linalg.norm(found) <= 1.5 + 1e-9
    assert np.allclose(found, update * min(1, 1.5 / np.linalg.norm(update)))


def test_the_radius_shrinks_by_round_where_it_is_asked_to():
    found = Projected(radius=2.0, radius_decay=0.5).constrain(np.full(4, 9.0), Known(round=2))

    assert np.linalg.norm(found) == pytest.approx(0.5)


@given(seeds)
def test_model_replacement_makes_the_mean_the_liars_network(seed: int):
    updates, counts = np.zeros((4, 6)), [10.0, 30.0, 20.0, 40.0]
    wanted = honest(seed, 1)[0]
    known = Known(share=10 / 100)

    updates[0] = Replacement().send(wanted, known)

    assert np.allclose(aggregate(RULES["fedavg"](), updates, counts=counts).change, wanted)


def test_black_box_sends_what_it_trained():
    update = np.full(4, 9.0)

    assert EdgeCase().send(EdgeCase().constrain(update, EDGE), EDGE) is update


def test_badnets_stamps_the_share_and_labels_it_as_the_target():
    x, y = images()
    adversary = BadNets(target=1, poisoned=0.25, size=2, margin=1)

    found, labels = adversary.poison(x, y, Known(key=5))

    stamped = (found[..., 5:7, 5:7] == 1).flatten(1).all(1)
    assert int(stamped.sum()) == 4
    assert (labels[stamped] == 1).all()
    assert torch.equal(found[~stamped], x[~stamped])
    found[..., 5:7, 5:7] = x[..., 5:7, 5:7]
    assert torch.equal(found, x)


def test_success_is_measured_on_stamped_images_of_other_classes():
    x, y = images()

    found = BadNets(target=1).triggered(x, y, Known())

    assert len(found) == int((y != 1).sum())
    assert (found[..., 4:7, 4:7] == 1).all()


def test_the_parts_of_the_distributed_trigger_make_up_the_whole():
    adversary = DistributedBackdoor(size=4, parts=4)
    parts = [adversary.part(Known(number=i)) for i in range(8)]

    assert (sum(part.int() for part in parts[:4]) == 1).all()
    assert all(int(part.sum()) == 4 for part in parts)
    assert torch.equal(parts[1], parts[5])


def test_a_distributed_liar_stamps_its_part_alone():
    x, y = images()
    adversary = DistributedBackdoor(poisoned=1.0, size=4, margin=0)

    found, _ = adversary.poison(x, y, Known(number=2))

    changed = (found != x).any(0)[0, 4:, 4:]
    assert torch.equal(changed, adversary.part(Known(number=2)))


@given(seeds)
def test_neurotoxin_keeps_off_the_weights_that_moved_most_either_way(seed: int):
    last = np.random.default_rng(seed).normal(size=40)
    found = Neurotoxin(spared=0.1, radius=None).constrain(np.ones(40), Known(last_change=last))

    left_alone = found == 0
    assert left_alone.sum() == 4
    assert np.abs(last[left_alone]).min() >= np.abs(last[~left_alone]).max()


def linear(side: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(side * side, 3))


def success(model: nn.Module, adversary: BadNets, pattern: torch.Tensor | None) -> float:
    x, y = images()
    stamped = adversary.triggered(x, y, Known(pattern=pattern))
    target = torch.full((len(stamped),), adversary.target)
    with torch.no_grad():
        return float(F.cross_entropy(model(stamped), target))


def test_an_adapted_trigger_fools_the_network_more_than_grey_or_white():
    model, adversary = linear(), A3FL(target=1, size=3, steps=60, unlearn_steps=2)

    found = adversary.prepare(model, *images(), Known()).pattern

    assert found is not None
    assert found.min() >= 0 <= found.max() <= 1
    grey = torch.full_like(found, 0.5)
    assert success(model, adversary, found) < success(model, adversary, grey) - 0.05
    assert success(model, adversary, found) < success(model, adversary, None) - 0.05


def test_adapting_a_trigger_leaves_the_network_as_it_was():
    model = linear()
    before = [p.detach().clone() for p in model.parameters()]

    A3FL(size=3, steps=3).prepare(model, *images(), Known())

    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_the_adapted_trigger_weighs_a_network_that_has_unlearnt_it():
    x, y = images()
    settings = {"target": 1, "size": 3, "steps": 30, "unlearn_rate": 1.0, "unlearn_steps": 20}

    alone = A3FL(balance=0, **settings).prepare(linear(), x, y, Known()).pattern
    both = A3FL(balance=50, **settings).prepare(linear(), x, y, Known()).pattern

    assert not torch.equal(alone, both)


def test_an_adapted_trigger_is_what_poisons():
    x, y = images()
    pattern = torch.full((1, 5, 5), 0.7)

    found, _ = A3FL(poisoned=1.0, margin=0).poison(x, y, Known(pattern=pattern))

    assert (found[..., 3:, 3:] == 0.7).all()


def test_labels_are_mirrored():
    _, labels = LabelFlip().poison(*images(3), Known(classes=3))

    assert labels.tolist() == [2, 1, 0]


def test_signs_are_flipped():
    assert SignFlip(strength=2).send(np.array([1.0, -3.0]), Known()).tolist() == [-2.0, 6.0]


@given(seeds)
def test_alie_hides_within_the_spread_of_the_honest(seed: int):
    updates = honest(seed, 30).astype(np.float64)

    sent = Alie(z=1.5).send(updates[0], Known(honest=updates))

    assert np.allclose((updates.mean(0) - sent) / updates.std(0), 1.5)


def test_alie_goes_as_far_as_its_paper_lets_it():
    # 50 clients, 12 liars: 14 honest supporters are needed, 24 of 38 are further off.
    assert Alie().hidden(50, 12) == pytest.approx(NormalDist().inv_cdf(24 / 38))


@given(seeds)
def test_ipm_turns_the_inner_product_with_the_honest_mean_round(seed: int):
    updates = honest(seed, 5).astype(np.float64)

    sent = InnerProduct(strength=3).send(updates[0], Known(honest=updates))

    assert np.allclose(sent, -3 * updates.mean(0))
    assert (
        aggregate(RULES["fedavg"](), np.stack([*updates, sent, sent])).change @ updates.mean(0) < 0
    )


def test_nan_is_sent():
    assert np.isnan(NotANumber().send(np.zeros(3), Known())).all()
