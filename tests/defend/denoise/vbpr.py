"""VBPR (He and McAuley 2016) on made users and items: recommendations that look at pictures.

The preference of user u for item i is b_i + p_u . q_i + t_u . E f_i, where f_i are features of the
item's picture. It is trained on pairs of an item that a user has and one that the user does not
have (Bayesian personalised ranking, Rendle et al. 2009).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

USERS, ITEMS, STYLES = 80, 60, 4


@dataclass(frozen=True)
class Market:
    """Pictures (I, 1, S, S) of items, their styles (I,), and who has what, (U, I)."""

    pictures: Tensor
    styles: Tensor
    has: Tensor


def make_market(pictures: Tensor, styles: Tensor) -> Market:
    """Return a market in which each user likes one style, and has a third of its items."""
    generator = torch.Generator().manual_seed(0)
    liked = torch.arange(USERS) % STYLES
    chance = torch.where(liked[:, None] == styles[None], 0.35, 0.02)
    return Market(pictures, styles, torch.rand(USERS, len(styles), generator=generator) < chance)


class Vbpr(nn.Module):
    """Preferences of all users for items, given the features (I, D) of their pictures."""

    def __init__(self, items: int, width: int, *, latent: int = 8) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(items))
        self.users, self.items = (
            nn.Parameter(0.1 * torch.randn(n, latent)) for n in (USERS, items)
        )
        self.tastes = nn.Parameter(0.1 * torch.randn(USERS, latent))
        self.look = nn.Parameter(0.1 * torch.randn(width, latent))

    def forward(self, features: Tensor) -> Tensor:
        """Return the preferences (U, I)."""
        visual = self.tastes @ (features @ self.look).T
        found: Tensor = self.bias + self.users @ self.items.T + visual
        return found


def train(market: Market, features: Tensor, *, steps: int = 300) -> Vbpr:
    """Return a model trained on the pairs of the market."""
    torch.manual_seed(0)
    model = Vbpr(len(market.styles), features.shape[1])
    optimiser = torch.optim.Adam(model.parameters(), 0.02, weight_decay=1e-4)
    user, item = market.has.nonzero(as_tuple=True)
    for _ in range(steps):
        other = torch.randint(len(market.styles), item.shape)
        unseen = ~market.has[user, other]
        preferred = model(features)
        gap = preferred[user, item] - preferred[user, other]
        optimiser.zero_grad()
        (-F.logsigmoid(gap[unseen]).mean()).backward()
        optimiser.step()
    return model.requires_grad_(False)


def ranks(preferences: Tensor, market: Market, target: int) -> Tensor:
    """Return the rank of ``target``, from 1, for each user who does not have it."""
    asked = ~market.has[:, target]
    known = market.has.clone()
    known[:, target] = False
    shown = preferences.masked_fill(known, -torch.inf)[asked]
    return 1 + (shown > shown[:, target, None]).sum(1)


def hit_rate(ranked: Tensor, *, k: int) -> float:
    """Return the share of users to whom the target is shown among the first ``k`` items."""
    return float((ranked <= k).float().mean())


def ndcg(ranked: Tensor, *, k: int) -> float:
    """Return the mean of 1 / log2(rank + 1) where the rank is at most ``k``, and 0 elsewhere."""
    gain = 1 / torch.log2(ranked.float() + 1)
    return float(torch.where(ranked <= k, gain, torch.zeros(())).mean())
