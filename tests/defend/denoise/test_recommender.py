"""Where the denoiser comes from: attacks on pictures that promote an item to all users.

The setting of Yin et al. (arXiv 2306.07992), small: items with pictures of digits, a recommender
that looks at them through a network, and an attacker who changes one picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from vbpr import ITEMS, STYLES, Market, Vbpr, hit_rate, make_market, ndcg, ranks, train

from medspark.attacks.pgd import pgd
from medspark.attacks.threat import ThreatModel
from medspark.defend.denoise.config import DenoiseConfig
from medspark.defend.denoise.rule import denoising_rule
from medspark.models.card import DenoiserShape
from medspark.models.classifier import Classifier
from medspark.models.guarded import GuardedClassifier, guard_classifier
from medspark.train.config import AdversarialConfig
from medspark.train.learner import Learner, Sample
from medspark.train.objective import CrossEntropy

THREAT = ThreatModel(eps=38 / 255)
K = 10


class Backbone(nn.Module):
    """The digits network in timm's two halves; its penultimate layer describes a picture."""

    def __init__(self, network: nn.Sequential) -> None:
        super().__init__()
        self.maps, self.describe, self.head = network[:9], network[9:12], network[12]

    def forward_features(self, images: Tensor) -> Tensor:
        return self.maps(images)

    def forward_head(self, maps: Tensor) -> Tensor:
        return self.head(self.describe(maps))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


@dataclass(frozen=True)
class Shop:
    """A market, the network that looks at its pictures, and the recommender."""

    market: Market
    network: GuardedClassifier
    model: Vbpr
    features: Tensor

    def described(self, pictures: Tensor, *, denoise: bool) -> Tensor:
        seen = self.network.denoiser(pictures) if denoise else pictures
        return self.network.backbone.describe(self.network.features(seen))

    def preferences(self, picture: Tensor, target: int, *, denoise: bool) -> Tensor:
        """What all users think of all items, the target with another picture."""
        features = self.features.clone()
        features[target] = self.described(picture, denoise=denoise)[0]
        return self.model(features)

    def shown(self, picture: Tensor, target: int, *, denoise: bool) -> tuple[float, float]:
        """Hit rate and NDCG of the target."""
        with torch.no_grad():
            found = ranks(self.preferences(picture, target, denoise=denoise), self.market, target)
        return hit_rate(found, k=K), ndcg(found, k=K)

    def promoted(self, target: int, *, through: bool) -> Tensor:
        """The target's picture under PGD that makes users prefer it to their tenth item."""
        offered = self.model(self.features).masked_fill(self.market.has, -torch.inf)
        tenth = offered.topk(K, dim=1).values[:, -1]

        def wins(picture: Tensor) -> Tensor:
            liked = self.preferences(picture, target, denoise=through)[:, target]
            return torch.sigmoid(liked - tenth)[None]

        picture = self.market.pictures[target : target + 1]
        return pgd(
            wins,  # type: ignore[arg-type]
            picture,
            torch.zeros(1),
            threat=THREAT,
            steps=20,
            loss=lambda won, _: won.mean(1),
        )


@pytest.fixture(scope="module")
def shop(plain_network, digits) -> Shop:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _shop(plain_network, digits)


def _shop(plain_network: nn.Sequential, digits) -> Shop:
    classifier = Classifier(Backbone(plain_network), architecture="digits", mean=[0.0], std=[1.0])
    shape = DenoiserShape(grid=4, width=32, depth=2, heads=2, stem=16, embedding=8)
    network = guard_classifier(classifier, shape, size=(8, 8))
    network.freeze_classifier()
    _learn(network, digits.images, digits.labels)
    of_styles = (digits.test_labels < STYLES).nonzero().flatten()[:ITEMS]
    market = make_market(digits.test_images[of_styles], digits.test_labels[of_styles])
    network = network.eval().requires_grad_(False)
    with torch.no_grad():
        features = network.backbone.describe(network.features(market.pictures))
    return Shop(market, network, train(market, features), features)


def _learn(network: GuardedClassifier, images: Tensor, labels: Tensor, steps: int = 200) -> None:
    """Train the denoiser on other digits, by the rule of jobs/denoise.py."""
    rule = denoising_rule(DenoiseConfig(attacks=("fgsm", "pgd")), eps=THREAT.eps)
    learner = Learner(network, CrossEntropy(), AdversarialConfig(inner_steps=5))
    learning = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(learning, 3e-3)
    for key in range(steps):
        rows = torch.randperm(len(images))[:64]
        optimiser.zero_grad()
        rule(learner, Sample(images[rows], labels[rows], np.arange(64), 1.0, THREAT, key))
        optimiser.step()


def test_the_recommender_shows_users_the_style_that_they_like(shop: Shop) -> None:
    found = [
        hit_rate(ranks(shop.model(shop.features), shop.market, target), k=ITEMS // STYLES)
        for target in range(ITEMS)
    ]

    assert np.mean(found) > 1 / STYLES - 0.05  # a quarter of the users like the style of an item
    liked = torch.arange(len(shop.market.has)) % STYLES
    best = shop.market.styles[shop.model(shop.features).argmax(1)]
    assert (best == liked).float().mean() > 0.8


def test_an_attacked_picture_promotes_its_item_and_the_denoiser_takes_that_back(shop: Shop):
    """Means over the items that few users are shown before."""
    rows = []
    for target in range(0, ITEMS, 6):
        picture = shop.market.pictures[target : target + 1]
        attacked, knowing = (shop.promoted(target, through=t) for t in (False, True))
        rows.append(
            [
                shop.shown(picture, target, denoise=False),
                shop.shown(picture, target, denoise=True),
                shop.shown(attacked, target, denoise=False),
                shop.shown(attacked, target, denoise=True),
                shop.shown(knowing, target, denoise=True),
            ]
        )
    before, cleaned, attacked, denoised, through = np.mean(rows, axis=0)

    print(f"hit rate and NDCG at {K}: before {before}, denoised {cleaned}, attacked {attacked}, "
          f"attacked and denoised {denoised}, attacked through the denoiser {through}")  # fmt: skip
    assert (attacked > before + 0.06).all()
    assert (denoised < attacked - 0.02).all()
    assert np.abs(cleaned - before).max() < 0.05
    assert (through >= denoised - 1e-9).all()  # who knows the denoiser is not held back by it


def test_ranks_count_the_target_among_the_items_that_a_user_does_not_have() -> None:
    has = torch.tensor([[True, False, False], [False, False, True]])
    market = Market(torch.zeros(3, 1, 1, 1), torch.zeros(3), has)

    found = ranks(torch.tensor([[9.0, 1.0, 2.0], [3.0, 2.0, 9.0]]), market, 1)

    assert found.tolist() == [2, 2]
    assert hit_rate(found, k=1) == 0
    assert ndcg(found, k=2) == pytest.approx(1 / np.log2(3))
