"""Every attack by name: allowed images, real strength, agreement with foolbox."""

import copy
from typing import get_args

import foolbox
import pytest
import torch
from torch import Tensor, nn

from medspark.attacks.apgd import apgd
from medspark.attacks.boundary import nearby_planes, project_onto_plane
from medspark.attacks.carlini_wagner import carlini_wagner
from medspark.attacks.config import OF_DENOISED, AttackName, Effort
from medspark.attacks.deepfool import deepfool
from medspark.attacks.fab import fab
from medspark.attacks.keyed_random import KeyedRandom
from medspark.attacks.losses import correct, cross_entropy
from medspark.attacks.pgd import pgd
from medspark.attacks.suite import attacks_by_name, one_after_another
from medspark.attacks.threat import Norm, ThreatModel, norms

# The others attack a denoiser: test_bpda.py.
NAMES = tuple(name for name in get_args(AttackName) if name not in OF_DENOISED)
PARTS = ["apgd_ce", "apgd_dlr", "fab", "square"]  # of autoattack
NORMS = get_args(Norm)
EFFORT = Effort(steps=10, queries=200)
ANYWHERE = ThreatModel.model_construct(eps=1.0)  # more than a job accepts
COUNT = 50


@pytest.fixture(scope="module")
def victim(robust_network) -> nn.Module:
    return robust_network.requires_grad_(False)


@pytest.fixture(scope="module")
def images(digits) -> Tensor:
    return digits.test_images[:COUNT]


@pytest.fixture(scope="module")
def labels(digits) -> Tensor:
    return digits.test_labels[:COUNT]


def right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return correct(model(images), labels)


def sizes(change: Tensor, norm: Norm) -> Tensor:
    return change.abs().flatten(1).amax(1) if norm == "linf" else norms(change).flatten()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NAMES)
def test_attacked_images_are_allowed(victim, plain_network, images, labels, name, norm) -> None:
    attack = attacks_by_name([name], EFFORT, surrogates=[plain_network])[name]
    threat = ThreatModel(norm=norm, eps=0.1)

    attacked = attack(victim, images, labels, threat, KeyedRandom.for_whole(images))

    assert threat.holds(attacked, images).all()


@pytest.mark.parametrize("device", ["pretended", "cuda"], indirect=True)
@pytest.mark.parametrize("norm", NORMS)
def test_every_attack_finds_elsewhere_what_it_finds_on_the_cpu(
    victim, plain_network, images, labels, norm, device
) -> None:
    def few_steps(model, images, labels, threat, _rng):
        return threat.project(carlini_wagner(model, images, labels, steps=4, searches=2), images)

    threat, effort = ThreatModel(norm=norm, eps=0.1), Effort(steps=3, restarts=2, queries=20)
    names = [name for name in NAMES if name not in ("cw", *PARTS)]
    left = []
    for place in (torch.device("cpu"), device):
        model, other = (copy.deepcopy(m).to(place) for m in (victim, plain_network))
        clean, true = images[:20].to(place), labels[:20].to(place)
        suite = attacks_by_name(names, effort, surrogates=[other]) | {"cw": few_steps}
        found = {
            n: a(model, clean, true, threat, KeyedRandom.for_whole(clean)) for n, a in suite.items()
        }
        assert [name for name, x in found.items() if not threat.holds(x, clean).all()] == []
        left.append({name: right(model, x, true).cpu() for name, x in found.items()})

    # Rounding may change the prediction of an image at the boundary.
    assert [name for name in left[0] if (left[0][name] != left[1][name]).sum() > 1] == []


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("transfer", "cw")])
def test_every_attack_does_what_an_attack_has_to(victim, images, labels, name: str) -> None:
    attack = attacks_by_name([name], EFFORT)[name]
    threat = ThreatModel(eps=0.2)

    attacked = attack(victim, images, labels, threat, KeyedRandom.for_whole(images))

    clean = right(victim, images, labels).sum()
    assert right(victim, attacked, labels).sum() < 0.75 * clean


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_attacked_alike_in_any_batch(
    victim, plain_network, images, labels, name: str
) -> None:
    attack = attacks_by_name([name], EFFORT, surrogates=[plain_network])[name]
    threat, rng = ThreatModel(eps=0.1), KeyedRandom.for_whole(images)
    whole = attack(victim, images, labels, threat, rng)

    chosen = torch.tensor([40, 3, 17, 29, 8, 11, 46, 0, 31, 22])
    alone = attack(victim, images[chosen], labels[chosen], threat, rng.of(chosen))

    held = [right(victim, found, labels[chosen]) for found in (alone, whole[chosen])]
    # Another batch size rounds differently, which may change an image at the boundary.
    assert (held[0] != held[1]).sum() <= 1


def test_the_ensemble_leaves_no_more_than_any_of_its_parts(victim, images, labels) -> None:
    threat, rng = ThreatModel(eps=0.2), KeyedRandom.for_whole(images)
    found = {
        name: right(victim, attack(victim, images, labels, threat, rng), labels)
        for name, attack in attacks_by_name([*PARTS, "autoattack"], EFFORT).items()
    }

    # The parts run on smaller batches, which round differently.
    assert found["autoattack"].sum() <= min(found[name].sum() for name in PARTS) + 1


@pytest.mark.parametrize("classes", [2, 3, 5, 14])
def test_the_ensemble_works_for_any_number_of_classes(classes: int) -> None:
    model = linear(classes)
    images = torch.rand(8, 1, 4, 4)
    labels = model(images).argmax(1)
    attack = attacks_by_name(["autoattack"], EFFORT)["autoattack"]

    attacked = attack(model, images, labels, ANYWHERE, KeyedRandom.for_whole(images))

    assert not right(model, attacked, labels).any()


@pytest.mark.parametrize("name", ["fgsm", "pgd_margin", "autoattack", "deepfool", "cw"])
def test_independent_findings_are_attacked_too(name: str) -> None:
    model = linear(3)
    images = torch.rand(8, 1, 4, 4)
    labels = (model(images) > 0).float()
    attack = attacks_by_name([name], EFFORT)[name]

    attacked = attack(model, images, labels, ANYWHERE, KeyedRandom.for_whole(images))

    assert right(model, attacked, labels).float().mean() < 0.2


def linear(classes: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, classes, bias=False))


def test_of_an_ensemble_each_part_only_sees_what_the_others_left(victim, images, labels) -> None:
    seen: list[int] = []

    def counting(model, images, labels, threat, _rng):
        seen.append(len(images))
        return pgd(model, images, labels, threat=threat, steps=5)

    attack = one_after_another([counting, counting])
    attack(victim, images, labels, ThreatModel(eps=0.2), KeyedRandom.for_whole(images))

    assert seen[0] == COUNT
    assert 0 < seen[1] < COUNT


def test_apgd_leaves_an_image_once_it_is_fooled_and_loses_none(victim, images, labels) -> None:
    seen: list[tuple[int, int]] = []

    def watched(logits: Tensor, labels: Tensor) -> Tensor:
        if logits.requires_grad:  # a pass of the attack, not the reading of its result
            seen.append((len(labels), int((~correct(logits, labels)).sum())))
        return cross_entropy(logits, labels)

    attacked = apgd(
        *(victim, images, labels),
        threat=ThreatModel(eps=0.2), loss=watched, rng=KeyedRandom.for_whole(images), steps=50,
    )  # fmt: skip

    left = [count - fooled for count, fooled in seen]
    assert [count for count, _ in seen] == [COUNT, *left[:-1]]
    assert abs(int(right(victim, attacked, labels).sum()) - left[-1]) <= 1  # rounded otherwise
    assert left[-1] < COUNT / 2


def test_transfer_shows_the_model_what_fools_another(victim, plain_network, images, labels) -> None:
    attack = attacks_by_name(["transfer"], EFFORT, surrogates=[plain_network])["transfer"]
    threat = ThreatModel(eps=0.2)

    attacked = attack(victim, images, labels, threat, KeyedRandom.for_whole(images))

    assert right(plain_network, attacked, labels).sum() < 0.3 * COUNT
    assert right(victim, attacked, labels).sum() > 0.5 * COUNT


@pytest.mark.parametrize("norm", NORMS)
def test_deepfool_goes_as_near_as_that_of_foolbox(victim, images, labels, norm: Norm) -> None:
    oracle = foolbox.PyTorchModel(victim, bounds=(0, 1), device="cpu")
    attacks = {"linf": foolbox.attacks.LinfDeepFoolAttack, "l2": foolbox.attacks.L2DeepFoolAttack}
    theirs, *_ = attacks[norm](loss="logits")(oracle, images, labels, epsilons=None)

    ours = deepfool(victim, images, labels, norm=norm)

    near, nearest = (float(sizes(x - images, norm).median()) for x in (ours, theirs))
    assert near <= 1.02 * nearest
    assert right(victim, ours, labels).sum() <= 0.1 * COUNT


def test_carlini_wagner_goes_as_near_as_that_of_foolbox(victim, images, labels) -> None:
    oracle = foolbox.PyTorchModel(victim, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=4, steps=50, stepsize=0.05, initial_const=0.1, abort_early=False
    )
    theirs, *_ = attack(oracle, images, labels, epsilons=None)

    ours = carlini_wagner(victim, images, labels, steps=50, searches=4)

    fooled = ~right(victim, ours, labels) & ~right(victim, theirs, labels)
    assert fooled.float().mean() > 0.8
    near, nearest = (float(sizes(x - images, "l2")[fooled].median()) for x in (ours, theirs))
    assert near <= 1.02 * nearest


@pytest.mark.parametrize("norm", NORMS)
def test_fab_goes_nearer_than_deepfool(victim, images, labels, norm: Norm) -> None:
    first = deepfool(victim, images, labels, norm=norm)

    found = fab(victim, images, labels, norm=norm, rng=KeyedRandom.for_whole(images), steps=30)

    assert not right(victim, found, labels).any()
    assert sizes(found - images, norm).mean() < sizes(first - images, norm).mean()


@pytest.mark.parametrize("norm", NORMS)
def test_the_nearest_point_of_a_plane_is_on_it_and_in_the_box(victim, images, labels, norm) -> None:
    value, gradient = nearby_planes(victim, images, labels).nearest(norm)

    points = project_onto_plane(images, value, gradient, norm=norm)

    left = value + (gradient * (points - images)).flatten(1).sum(1)
    assert points.min() >= 0
    assert points.max() <= 1
    assert (left.abs() < 1e-3).float().mean() > 0.9  # the box does not reach every plane


def test_an_unknown_attack_is_an_error() -> None:
    with pytest.raises(KeyError):
        attacks_by_name(["rubber_hose"], EFFORT)
