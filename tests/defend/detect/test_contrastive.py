"""The contrastive detector, and the embedding as a layer of a guarded network."""

from __future__ import annotations

import pytest
import torch
from guarded_networks import build_guarded
from torch import nn

from medspark.defend.detect.contrastive import Contrastive
from medspark.defend.detect.extract import Extractor
from medspark.defend.detect.features import EMBEDDING, LOGITS, Features, chosen_layers, find_layers
from medspark.defend.detect.registry import grid

IMAGES = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(3))


def features(embeddings: torch.Tensor) -> Features:
    return Features(torch.zeros(len(embeddings), 2), {EMBEDDING: embeddings})


def test_the_score_is_the_distance_in_angle_from_the_mean_of_clean_images() -> None:
    detector = Contrastive.of(EMBEDDING, torch.tensor([[1.0, 0.1], [1.0, -0.1]]))

    scores = detector.score(features(torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])))

    assert scores.tolist() == pytest.approx([0.0, 1.0, 2.0], abs=1e-6)


def test_only_guarded_networks_have_the_embedding_among_their_layers() -> None:
    guarded = find_layers(build_guarded(), IMAGES)
    plain = find_layers(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(1800, 2)), IMAGES)

    assert guarded.names[-2:] == (LOGITS, EMBEDDING)
    assert EMBEDDING not in plain.names
    assert grid(["contrastive"], guarded.names) == [("contrastive", EMBEDDING)]
    assert grid(["contrastive"], plain.names) == []
    assert chosen_layers(["auto"], guarded, build_guarded()) == guarded.names


def test_one_pass_gives_logits_and_embedding_and_gradients_reach_the_image() -> None:
    network, x = build_guarded(), IMAGES.clone().requires_grad_(True)

    found = Extractor.on(network, (LOGITS, EMBEDDING), "").soft(x, 0)
    (gradient,) = torch.autograd.grad(found.layers[EMBEDDING][:, 0].sum(), x)

    assert torch.allclose(found.logits, network(IMAGES), atol=1e-6)
    assert torch.equal(found.layers[EMBEDDING], network(IMAGES, "whole").embedding)
    assert gradient.abs().sum() > 0
