"""A guarded network: it begins as its classifier, is a classifier, and comes back from disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from guarded_networks import SHAPE, build_guarded
from tensors import same_tensors

from medspark.errors import UsageError
from medspark.evaluate.gradcam import grad_cam
from medspark.models.card import CARD, PLAIN, DenoiserShape, Pruning, read_card
from medspark.models.checkpoint import (
    describe,
    first_network,
    load_classifier,
    save_classifier,
)
from medspark.models.config import ModelConfig
from medspark.models.denoiser import Denoiser
from medspark.models.guarded import GuardedClassifier

IMAGES = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    network = build_guarded()
    card = describe(network, classes=("a", "b"), height=32, width=32)
    save_classifier(tmp_path / "model", network, card)
    return tmp_path / "model"


def test_an_untrained_denoiser_changes_neither_images_nor_logits() -> None:
    network = build_guarded(trained=False)

    assert torch.equal(network.denoiser(IMAGES), IMAGES)
    assert torch.equal(network(IMAGES), network.classify(IMAGES))


def test_a_guarded_network_answers_what_its_classifier_says_of_the_denoised_images() -> None:
    network = build_guarded()
    denoised = network.denoiser(IMAGES)

    assert not torch.equal(denoised, IMAGES)
    assert 0 <= denoised.min() <= denoised.max() <= 1
    assert torch.equal(network(IMAGES), network.classify(denoised))


def test_one_whole_pass_gives_what_the_plain_one_gives_and_more() -> None:
    network = build_guarded()

    passed = network(IMAGES, "whole")

    assert torch.allclose(passed.logits, network(IMAGES), atol=1e-6)
    assert torch.equal(passed.denoised, network.denoiser(IMAGES))
    assert torch.allclose(passed.embedding.norm(dim=1), torch.ones(3))


def test_attention_is_global_what_is_subtracted_in_a_corner_depends_on_the_other() -> None:
    network, images = build_guarded(), IMAGES.clone()
    images[:, :, -4:, -4:] = 1 - images[:, :, -4:, -4:]

    before, after = (x - network.denoiser(x) for x in (IMAGES, images))

    assert not torch.equal(before[:, :, :4, :4], after[:, :, :4, :4])


@pytest.mark.parametrize("size", [(30, 45), (33, 32), (3, 5)])
def test_images_of_any_size_are_denoised_patches_or_not(size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size)

    assert torch.equal(Denoiser(SHAPE, channels=3, size=size)(images), images)


def test_gradients_reach_the_image_through_the_denoiser() -> None:
    network, x = build_guarded(), IMAGES.clone().requires_grad_(True)
    through, around = (
        torch.autograd.grad(f(x).square().sum(), x)[0] for f in (network, network.classify)
    )

    assert through.abs().sum() > 0
    assert not torch.allclose(through, around)


def test_a_frozen_classifier_stays_in_eval_mode_and_only_its_guards_learn() -> None:
    network = build_guarded().train()
    network.freeze_classifier()
    network.train()

    assert not any(module.training for module in network.backbone.modules())
    assert network.denoiser.training
    learning = {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert learning == {"denoiser", "contrast"}


def test_it_comes_back_bit_for_bit_of_its_own_kind(folder: Path) -> None:
    card, loaded = read_card(folder), load_classifier(folder)

    assert (card.kind, card.denoiser) == ("guarded", SHAPE)
    assert isinstance(loaded, GuardedClassifier)
    assert not loaded.training
    assert same_tensors(loaded, build_guarded())


def test_a_pruned_network_can_be_guarded(tmp_path: Path) -> None:
    network, pruning = build_guarded(), Pruning(method="magnitude", sparsity=0.5)
    card = describe(network, classes=("a", "b"), height=32, width=32, pruning=pruning)
    save_classifier(tmp_path, network, card)

    assert read_card(tmp_path).kind == "guarded"
    assert same_tensors(load_classifier(tmp_path), network)


def test_fine_tuning_starts_from_it_without_the_embedding(folder: Path) -> None:
    config = ModelConfig(name="test_resnet", weights=str(folder))
    network = first_network(config, num_classes=2, channels=1, size=(32, 32))

    learning = {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert learning == {"denoiser", "backbone"}


def test_who_cannot_take_a_denoiser_says_so_in_a_sentence(folder: Path) -> None:
    with pytest.raises(UsageError, match="kind guarded; this takes one of kind classifier or prun"):
        read_card(folder, kinds=PLAIN)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kind": "classifier"}, "kind classifier does not fit the description of the denoiser"),
        ({"denoiser": None}, "kind guarded does not fit the description of the denoiser"),
        ({"denoiser": {"width": 30, "heads": 4}}, "4 heads do not divide a width of 30"),
        ({"denoiser": {"depth": 10**6}}, "denoiser.depth"),
        # As it stands, this would be two thousand billion weights.
        ({"denoiser": {"grid": 1, "width": 2048, "stem": 1024}, "height": 999}, "cannot be loaded"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(folder: Path, changes: dict, sentence: str) -> None:
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | changes))

    with pytest.raises(UsageError, match=sentence):
        load_classifier(folder)


def test_grad_cam_looks_at_the_denoised_image() -> None:
    network, classes = build_guarded(), torch.zeros(3, dtype=torch.long)
    maps = grad_cam(network, IMAGES, classes)

    plain = build_guarded(trained=False)
    assert torch.equal(maps, grad_cam(plain, network.denoiser(IMAGES), classes))


def test_heads_have_to_divide_the_width() -> None:
    with pytest.raises(ValueError, match="3 heads do not divide a width of 128"):
        DenoiserShape(heads=3)
