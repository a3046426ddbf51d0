"""A client: central training where it is alone, and what each of its settings stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import small
import torch
from pydantic import ValidationError
from torch import nn

from medspark.attacks.threat import ThreatModel
from medspark.data.batch import to_unit
from medspark.data.config import AugmentConfig
from medspark.data.native import NativeReader
from medspark.errors import UsageError
from medspark.federate.adversary import Known
from medspark.federate.adversary.badnets import BadNets
from medspark.federate.adversary.edge_case import EdgeCase, Projected
from medspark.federate.adversary.sign_flip import SignFlip
from medspark.federate.aggregate import RULES, aggregate
from medspark.federate.calfat import Calibrated, calfat
from medspark.federate.client import Liar, Memory
from medspark.federate.local import LocalConfig
from medspark.federate.weights import NormPolicy, apply, difference, pack, reestimate, unpack
from medspark.models.classifier import batch_norms
from medspark.seeding import derive
from medspark.train.adversarial import MODES, take_step
from medspark.train.config import AdversarialConfig
from medspark.train.learner import Learner, Sample, pass_type, pgd_images
from medspark.train.objective import CrossEntropy, divergence

POLICIES = get_args(NormPolicy)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write(tmp_path_factory.mktemp("federation") / "shards")


@pytest.fixture
def start() -> np.ndarray:
    return pack(small.network(), "frozen")


def central(folder: Path, config: LocalConfig, *, epochs: int, norms_move: bool) -> nn.Module:
    """Train one network on all rows, epoch after epoch: torch's own loop, without federation."""
    model, rows = small.network(), small.rows_of(folder)
    reader = NativeReader(
        rows, global_batch=config.batch_size, seed=3, rank=0, world=1, augmentation=AugmentConfig()
    )
    computed = pass_type(config.precision, torch.device("cpu"))
    learner = Learner(model, CrossEntropy(), config.train, autocast=computed)
    optimiser = torch.optim.SGD(model.parameters(), lr=config.lr)
    for epoch in range(epochs):
        for step, batch in enumerate(reader.batches(epoch)):
            model.train()
            for layer in batch_norms(model):
                layer.train(norms_move)
            key = derive(3, "noise", epoch, step)
            images = to_unit(batch.images, torch.device("cpu"))
            take_step(learner, Sample(images, batch.labels, batch.rows, 1.0, config.attack, key))
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
            optimiser.step()
            optimiser.zero_grad()
    return model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("policy", ["frozen", "average"])
@pytest.mark.parametrize("mode", ["standard", "fused_noise", "pgd"])
def test_a_federation_of_one_client_is_central_training_bit_for_bit(
    folder: Path, mode: Any, policy: Any, precision: Any
):
    config = small.local(mode, batch_norm=policy, precision=precision)
    weights = pack(small.network(), policy)

    for round in range(3):
        answer = small.train(
            folder, weights, config, round=round, seed=3, augmentation=AugmentConfig()
        )
        update = difference(answer.weights, weights)
        weights = apply(weights, aggregate(RULES["fedavg"](), update[None], counts=[24]).change)

    alone = central(folder, config, epochs=3, norms_move=policy == "average")
    assert np.array_equal(weights, pack(alone, policy))


@pytest.mark.parametrize("mode", sorted(set(MODES) - {"ikl"}))
def test_every_mode_trains_and_the_same_task_gives_the_same_bits(
    folder: Path, start: np.ndarray, mode: Any
):
    one, other = (small.train(folder, start, small.local(mode), round=2) for _ in range(2))

    assert np.array_equal(one.weights, other.weights)
    assert not np.array_equal(one.weights, start)
    assert (one.images, one.loss) == (24, other.loss)
    assert one.steps == 3 * (4 if mode == "free" else 1)


def test_passes_in_bf16_change_what_a_client_learns_by_rounding_alone(
    folder: Path, start: np.ndarray
):
    one, other = (
        small.train(folder, start, small.local("fused_noise", precision=precision))
        for precision in ("fp32", "bf16")
    )

    assert other.weights.dtype == one.weights.dtype
    moved = np.linalg.norm(one.weights - start)
    assert 0 < np.linalg.norm(other.weights - one.weights) < 0.1 * moved


def test_another_round_sees_the_images_in_another_order(folder: Path, start: np.ndarray):
    one, other = (small.train(folder, start, small.local(), round=r) for r in (0, 1))

    assert not np.array_equal(one.weights, other.weights)


def test_a_client_without_images_is_refused(folder: Path, start: np.ndarray):
    with pytest.raises(UsageError, match="without images"):
        small.train(folder, start, small.local(), rows=np.empty(0, np.int64))


def test_weights_of_another_network_are_refused(folder: Path, start: np.ndarray):
    with pytest.raises(ValueError, match="of this network"):
        small.train(folder, start[1:], small.local())


def test_fedprox_pulls_towards_the_rounds_weights(folder: Path, start: np.ndarray):
    far = [
        np.linalg.norm(small.train(folder, start, small.local(prox=mu)).weights - start)
        for mu in (0.0, 1.0, 5.0)
    ]

    assert far == sorted(far, reverse=True)
    assert far[0] > 1.05 * far[-1]


def test_the_first_step_of_fedprox_is_plain(folder: Path, start: np.ndarray):
    rows = np.arange(8)
    plain, pulled = (
        small.train(folder, start, small.local(prox=mu), rows=rows).weights for mu in (0, 100)
    )

    assert np.array_equal(plain, pulled)


def test_scaffold_adds_the_controls_to_every_step(folder: Path, start: np.ndarray):
    rows, ours, server = np.arange(8), np.full(len(start), 0.25), np.full(len(start), 1.0)
    plain = small.train(folder, start, small.local(clip_grad=0), rows=rows)

    answer = small.train(
        folder,
        start,
        small.local(clip_grad=0, scaffold=True),
        rows=rows,
        control=server,
        memory=Memory(control=ours),
    )

    assert np.allclose(answer.weights, plain.weights - 0.1 * 0.75, atol=1e-6)
    following = ours - server + (start - answer.weights) / (answer.steps * 0.1)
    assert np.allclose(answer.memory.control, following, atol=1e-5)
    assert np.allclose(answer.control_change, following - ours, atol=1e-5)


def test_scaffolds_first_control_is_the_mean_gradient(folder: Path, start: np.ndarray):
    answer = small.train(folder, start, small.local(clip_grad=0, scaffold=True), rows=range(8))

    assert np.allclose(start - 0.1 * answer.memory.control, answer.weights, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"epochs": 8, "epochs_decay": 0.5}, [8, 4, 2, 1, 1]),
        ({"epochs": 4, "epochs_decay": 0.5, "epochs_every": 2}, [4, 4, 2, 2, 1]),
        ({"epochs": 3}, [3, 3, 3, 3, 3]),
    ],
)
def test_local_epochs_decay_over_the_rounds(settings: dict[str, Any], passes: list[int]):
    assert [LocalConfig(**settings).epochs_in(round) for round in range(5)] == passes


def test_the_decayed_epochs_are_what_is_trained(folder: Path, start: np.ndarray):
    config = small.local(epochs=4, epochs_decay=0.5)

    assert [small.train(folder, start, config, round=r).steps for r in (0, 1)] == [12, 6]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_travels_comes_back_from_a_vector(policy: Any):
    one, other = small.network(), small.network()
    for tensor in [*one.parameters(), *one.buffers()]:
        tensor.data = tensor.data + 1

    unpack(other, pack(one, policy), policy)

    assert np.array_equal(pack(one, policy), pack(other, policy))


@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_says_what_of_batch_norm_travels(policy: Any):
    channels = sum(layer.num_features for layer in batch_norms(small.network()))
    everything = sum(p.numel() for p in small.network().parameters())

    more = {"average": 2 * channels, "local": -2 * channels}.get(policy, 0)
    assert len(pack(small.network(), policy)) == everything + more


def test_local_norms_stay_with_the_client(folder: Path):
    weights, config = pack(small.network(), "local"), small.local(batch_norm="local")
    first = small.train(folder, weights, config)

    forgetful = small.train(folder, weights, config, round=1)
    again = small.train(folder, weights, config, round=1, memory=first.memory)

    assert first.memory.norms is not None
    assert not np.array_equal(again.weights, forgetful.weights)
    assert not np.array_equal(again.memory.norms, first.memory.norms)


def test_average_moves_the_statistics_and_frozen_does_not(folder: Path):
    def moved(policy: Any) -> bool:
        model = small.network()
        before = [b.clone() for layer in batch_norms(model) for b in layer.buffers()]
        small.train_client(
            model,
            small.rows_of(folder),
            small.Task(pack(model, policy)),
            small.local(batch_norm=policy),
        )
        after = [b for layer in batch_norms(model) for b in layer.buffers()]
        return not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    assert moved("average")
    assert not moved("frozen")


def test_statistics_are_taken_from_the_images_alone():
    model, images = small.network(), torch.rand(10, 1, 12, 12)
    layer = next(batch_norms(model))

    reestimate(model, [images[:5], images[5:]])

    with torch.no_grad():
        seen = model.backbone[0](model.normalise(images))
    assert torch.allclose(layer.running_mean, seen.mean((0, 2, 3)), atol=1e-5)
    assert layer.momentum == 0.1
    assert not layer.training


def test_calfat_learns_from_calibrated_logits_and_is_deployed_without(
    folder: Path, start: np.ndarray
):
    calibrated = small.train(folder, start, small.local("pgd", calibrate="calfat"))
    loss = small.train(folder, start, small.local("pgd", calibrate="loss"))
    plain = small.train(folder, start, small.local("pgd"))

    assert len({a.weights.tobytes() for a in (calibrated, loss, plain)}) == 3


def test_a_client_of_one_class_learns_nothing_about_classes_from_calfat(
    folder: Path, start: np.ndarray
):
    rows = np.flatnonzero(small.rows_of(folder).labels == 1)

    calibrated = small.train(folder, start, small.local(calibrate="calfat"), rows=rows)
    plain = small.train(folder, start, small.local(), rows=rows)

    assert calibrated.loss < 1e-3 < plain.loss
    assert np.abs(calibrated.weights - start).max() < 1e-3 < np.abs(plain.weights - start).max()


def test_calfat_attacks_the_calibrated_answers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 3))
    images, labels = torch.rand(6, 1, 3, 3), torch.tensor([0, 0, 0, 0, 1, 2])
    factors = torch.tensor([4.0, 1.0, 1.0])
    learner = Learner(
        model,
        Calibrated(factors),
        AdversarialConfig(mode="pgd", inner_steps=3),
        step_rule=calfat,
    )
    sample = Sample(images, labels, np.arange(6), 1.0, ThreatModel(eps=0.1), 1)
    with torch.no_grad():
        answers = model(images) + factors.log()

    attacked = take_step(learner, sample).attacked

    expected = pgd_images(
        learner, sample, lambda z, y: divergence(answers, z + (factors + 1e-7).log(), y)
    )
    assert torch.equal(attacked, expected)


def test_a_liar_trains_on_what_it_has_poisoned(folder: Path, start: np.ndarray):
    liar = Liar(BadNets(target=1, poisoned=1.0))

    honest, lied = (small.train(folder, start, small.local(), liar=who) for who in (None, liar))

    assert not np.array_equal(honest.weights, lied.weights)


def test_a_projected_liar_sends_nothing_further_than_its_radius(folder: Path, start: np.ndarray):
    known = Known(edge=torch.ones(4, 1, 12, 12), share=1.0)
    black_box, projected = (
        small.train(folder, start, small.local(), liar=Liar(adversary, known))
        for adversary in (EdgeCase(), Projected(radius=0.02, every=1))
    )

    assert np.linalg.norm(difference(black_box.weights, start)) > 0.02
    assert np.linalg.norm(difference(projected.weights, start)) <= 0.02 * (1 + 1e-5)


def test_the_last_step_is_projected_too(folder: Path, start: np.ndarray):
    known = Known(edge=torch.ones(4, 1, 12, 12), share=1.0)
    seldom = Liar(Projected(radius=0.02, every=1000), known)

    sent = small.train(folder, start, small.local(), liar=seldom).weights

    assert np.linalg.norm(difference(sent, start)) <= 0.02 * (1 + 1e-5)


def test_a_sign_flipper_sends_the_opposite(folder: Path, start: np.ndarray):
    honest, lied = (
        small.train(folder, start, small.local(), liar=who) for who in (None, Liar(SignFlip()))
    )

    # Its images are not augmented, and neither are the honest client's here.
    assert np.allclose(start - lied.weights, honest.weights - start, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"scaffold": True, "momentum": 0.9},
        {"scaffold": True, "optimiser": "adamw"},
        {"scaffold": True, "batch_norm": "average"},
        {"train": AdversarialConfig(dual_bn=True)},
    ],
)
def test_settings_that_contradict_one_another_are_refused(settings: dict[str, Any]):
    with pytest.raises(ValidationError):
        LocalConfig(**settings)
