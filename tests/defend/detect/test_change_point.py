"""(k, p) of an image's components is what a loop over ranks by hand gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from medspark.attacks.components import Components
from medspark.defend.detect.change_point import (
    change_point,
    second_answer,
    soft_change_point,
)


def network(seed: int, channels: int, width: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * 6 * width, 16), nn.Tanh(),
                             nn.Linear(16, 4)).double()  # fmt: skip


def pictures(seed: int, channels: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(5, channels, 6, width, generator=generator, dtype=torch.float64)


def by_hand(model: nn.Module, image: Tensor, *, centred: bool) -> tuple[int, float, int]:
    """Return k, p and the answer of one image (C, H, W), one rank after another."""
    rows = image.permute(1, 2, 0).reshape(image.shape[1], -1).numpy()
    mean = rows.mean(0) if centred else 0 * rows[0]
    u, s, vt = np.linalg.svd(rows - mean, full_matrices=False)
    answers, likely = {}, {}
    for rank in range(len(s), 0, -1):
        lower = u[:, :rank] @ np.diag(s[:rank]) @ vt[:rank] + mean
        shaped = torch.from_numpy(lower).reshape(image.shape[1], image.shape[2], -1)
        logits = model(shaped.permute(2, 0, 1)[None])[0].detach()
        answers[rank], likely[rank] = int(logits.argmax()), logits.softmax(0)
    final = answers[len(s)]
    k = max([rank for rank in answers if answers[rank] != final], default=0)
    return k, float(likely[k + 1][final]), answers[k] if k else final


@given(st.integers(0, 50), st.booleans(), st.sampled_from([(1, 5), (3, 4), (1, 9)]))
def test_k_p_and_the_answer_are_those_of_one_rank_after_another(seed, centred, shape):
    model, images = network(seed, *shape), pictures(seed, *shape)

    found = change_point(model, images, model(images), centred=centred)

    for row, image in enumerate(images):
        k, p, answer = by_hand(model, image, centred=centred)
        assert (int(found.k[row]), int(found.answer[row])) == (k, answer)
        assert float(found.p[row]) == pytest.approx(p, abs=1e-9)


@pytest.mark.parametrize("centred", [True, False])
def test_all_components_make_the_image_and_a_projection_is_a_reconstruction(centred: bool):
    images = pictures(1, 3, 4)
    parts = Components.of(images, centred=centred)

    assert torch.allclose(parts.image(parts.count), images)
    assert torch.allclose(parts.projected(images, 3), parts.image(3))


def test_an_image_that_always_has_its_class_has_k_0():
    model, images = network(0, 1, 5), pictures(0, 1, 5)
    with torch.no_grad():
        model[-1].weight.zero_()
        model[-1].bias.copy_(torch.tensor([0.0, 2.0, 1.0, 0.0]))

    found = change_point(model, images, model(images), centred=False)

    assert found.k.tolist() == [0] * 5
    assert found.answer.tolist() == [1] * 5
    assert second_answer(model(images)).tolist() == [2] * 5


def test_a_sharp_soft_change_point_is_the_change_point():
    model, images = network(3, 1, 5), pictures(3, 1, 5)
    logits = model(images)

    soft = soft_change_point(model, images, logits, centred=False, temperature=1e-6)

    exact = change_point(model, images, logits, centred=False)
    assert torch.allclose(soft, exact.features, atol=1e-6)


def test_a_change_point_asks_no_more_once_every_answer_has_changed():
    model, images, passes = network(3, 1, 5), pictures(3, 1, 5), []
    model.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    logits = model(images)
    passes.clear()

    found = change_point(model, images, logits, centred=False)

    ranks = 5 - found.k.clamp_min(1)
    assert sum(passes) == int(ranks.sum())
