"""Each mode has the gradient of its equation, with the number of passes in the cost table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given as given_any
from hypothesis import strategies as st
from tiny_network import build_sample
from torch import Tensor, nn

from medspark.attacks.pgd import pgd
from medspark.attacks.threat import ThreatModel
from medspark.models.classifier import Classifier, freeze_batch_norm
from medspark.train.adversarial import MODES, take_step
from medspark.train.config import AdversarialConfig
from medspark.train.learner import Learner, Sample
from medspark.train.noise import keyed_noise
from medspark.train.objective import CrossEntropy, divergence

Tiny = Callable[..., Classifier]
Make = Callable[..., Sample]


def learnt(model: nn.Module, sample: Sample, **chosen: object) -> dict[str, Tensor]:
    """Return the gradient that a mode leaves, by parameter."""
    learner = Learner(model, CrossEntropy(), AdversarialConfig.model_validate(chosen))
    take_step(learner, sample)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.3])
def test_fused_is_naive_bit_for_bit(
    frozen: bool, share: float, device: torch.device, tiny: Tiny, sample: Make
):
    gradients = []
    for mode in ("naive", "fused"):
        model = tiny().double().train().to(device)
        if frozen:
            freeze_batch_norm(model)
        gradients.append(learnt(model, sample(device=device), mode=mode, clean_share=share))

    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize(
    ("mode", "forwards", "backwards", "of_weights"),
    [
        ("standard", 1, 1, 1),
        ("naive", 3, 3, 2),
        ("fused", 2, 2, 2),
        ("fused_noise", 2, 2, 2),
        ("nfgsm", 2, 2, 1),
        ("rs_fgsm", 2, 2, 1),
        ("free", 1, 1, 1),
        ("pgd", 4, 4, 1),
        ("trades", 6, 5, 2),
        ("ikl", 6, 5, 2),
    ],
)
def test_a_step_costs_the_passes_of_the_table(
    mode: str, forwards: int, backwards: int, of_weights: int, tiny: Tiny, sample: Make
):
    model, count = tiny().double(), {"forward": 0, "backward": 0, "of weights": 0}

    def backward(_: Tensor) -> None:
        count["backward"] += 1

    def forward(module: nn.Module, __: object, output: Tensor) -> None:
        count["forward"] += 1
        if output.requires_grad:
            output.register_hook(backward)
            count["of weights"] += all(p.requires_grad for p in module.parameters())

    model.register_forward_hook(forward)
    learnt(model, sample(), mode=mode, inner_steps=3)

    assert count == {"forward": forwards, "backward": backwards, "of weights": of_weights}
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_all_passes_of_a_step_compute_at_the_training_precision(
    mode: str, precision: torch.dtype | None, tiny: Tiny, sample: Make
):
    model, seen = tiny().float(), set[torch.dtype]()
    linear = next(m for m in model.modules() if isinstance(m, nn.Linear))
    linear.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    config = AdversarialConfig.model_validate({"mode": mode, "inner_steps": 2})
    learner = Learner(model, CrossEntropy(), config, autocast=precision)

    take_step(learner, sample(dtype=torch.float32))

    assert seen == {precision or torch.float32}


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_fused_is_the_gradient_of_the_mixed_loss(share: float, tiny: Tiny, sample: Make):
    model, given = tiny().double().eval(), sample()
    x = given.images.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(F.cross_entropy(model(x), given.labels), x)
    attacked = (given.images + given.threat.eps * slope.sign()).clamp(0, 1)
    clean = F.cross_entropy(model(given.images), given.labels)
    adversarial = F.cross_entropy(model(attacked), given.labels)
    (share * clean + (1 - share) * adversarial).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    found = learnt(model, given, mode="fused", clean_share=share)

    assert all(torch.allclose(expected[k], found[k], rtol=1e-12, atol=1e-15) for k in expected)


def test_plain_training_is_cross_entropy(tiny: Tiny, sample: Make):
    model, given = tiny().double().eval(), sample()
    F.cross_entropy(model(given.images), given.labels).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    found = learnt(model, given, mode="standard")

    assert all(torch.allclose(expected[k], found[k], rtol=1e-12) for k in expected)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_the_gradient_scales_with_the_weight(mode: str, tiny: Tiny, sample: Make):
    model, given = tiny().double().eval(), sample()
    single = learnt(model, given, mode=mode)
    model.zero_grad()

    double = learnt(model, replace(given, weight=2.0), mode=mode)

    assert all(torch.allclose(2 * single[k], double[k], rtol=1e-9, atol=1e-12) for k in single)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_parts_of_a_batch_add_up_to_the_batch(mode: str, tiny: Tiny, sample: Make):
    model, given = tiny().double().eval(), sample()
    whole = learnt(model, given, mode=mode)
    model.zero_grad()
    for part in (slice(0, 4), slice(4, 10)):
        share = (part.stop - part.start) / 10
        piece = replace(
            given,
            images=given.images[part],
            labels=given.labels[part],
            rows=given.rows[part],
            weight=share,
        )
        parts = learnt(model, piece, mode=mode)

    assert all(torch.allclose(whole[k], parts[k], rtol=1e-8, atol=1e-12) for k in whole)


@pytest.mark.parametrize("mode", ["naive", "fused", "rs_fgsm", "pgd", "trades", "ikl"])
def test_attacked_images_stay_in_the_threat_model(mode: str, tiny: Tiny, sample: Make):
    given = sample()
    learner = Learner(tiny().double(), CrossEntropy(), AdversarialConfig(mode=mode))

    attacked = take_step(learner, given).attacked

    assert attacked is not None
    assert given.threat.holds(attacked, given.images).all()


@pytest.mark.parametrize("mode", ["fused_noise", "nfgsm"])
def test_noise_may_lead_out_of_the_eps_ball_but_not_out_of_the_pixel_range(
    mode: str, tiny: Tiny, sample: Make
):
    given = sample()
    learner = Learner(tiny().double(), CrossEntropy(), AdversarialConfig(mode=mode))

    attacked = take_step(learner, given).attacked

    assert attacked is not None
    change = (attacked - given.images).abs().max()
    assert given.threat.eps < change <= 3 * given.threat.eps + 1e-9
    assert ((attacked >= 0) & (attacked <= 1)).all()


def smooth_network() -> nn.Module:
    """Return a smooth, non-linear network, so that gradient steps are accurate."""
    torch.manual_seed(0)
    parts = nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(400, 2)
    return nn.Sequential(*parts).double()


def apart(model: nn.Module, given: Sample, near: Tensor) -> Tensor:
    """Return 1 - cos of the slopes at the images and at those near them, on average."""
    slopes = []
    for x in (given.images, near):
        x = x.clone().requires_grad_(True)
        loss = F.cross_entropy(model(x), given.labels)
        slopes.append(torch.autograd.grad(loss, x, create_graph=True)[0].flatten(1))
    return (1 - F.cosine_similarity(*slopes, dim=1)).mean()


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_gradalign_adds_a_penalty_that_falls_when_followed(weight: float, sample: Make):
    model = smooth_network()
    given = replace(sample(), weight=weight, threat=ThreatModel(eps=0.25))
    without = learnt(model, given, mode="rs_fgsm")
    model.zero_grad()
    penalised = learnt(model, given, mode="rs_fgsm", gradalign=10.0)
    noise = keyed_noise(given.images, given.rows, key=given.key)
    near = given.threat.random_start(given.images, (noise + 1) / 2)

    before = apart(model, given, near)

    slopes = torch.autograd.grad(10 * weight * before, list(model.parameters()), allow_unused=True)
    added = {name: penalised[name] - without[name] for name in without}
    for name, slope in zip(added, slopes, strict=True):
        expected = torch.zeros_like(added[name]) if slope is None else slope
        torch.testing.assert_close(added[name], expected)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= 1e-4 * added[name]
    assert apart(model, given, near) < before


def straight(model: nn.Module, given: Sample, start: Tensor) -> Tensor:
    """Return the sign of the loss's slope at ``start``."""
    x = start.clone().requires_grad_(True)
    return torch.autograd.grad(F.cross_entropy(model(x), given.labels), x)[0].sign()


@pytest.mark.parametrize("length", [None, 0.7])
@pytest.mark.parametrize("mode", ["naive", "fused", "fused_noise", "nfgsm", "rs_fgsm", "free"])
def test_each_mode_learns_from_the_images_of_its_equation(
    mode: str, length: float | None, sample: Make
):
    model, given = smooth_network(), sample()
    eps, clean = given.threat.eps, given.images
    noise = keyed_noise(clean, given.rows, key=given.key)
    start = {
        "naive": clean,
        "fused": clean,
        "fused_noise": clean + 3 * eps * noise,
        "nfgsm": clean + 3 * eps * noise,
        "rs_fgsm": clean + eps * noise,
        "free": clean + eps * noise,
    }[mode]
    step = (length or (1.25 if mode == "rs_fgsm" else 1.0)) * eps
    expected = start + step * straight(model, given, start)
    if mode in ("rs_fgsm", "free"):
        expected = expected.clamp(clean - eps, clean + eps)
    config = AdversarialConfig(mode=mode, noise=3.0, step_length=length)

    stats = take_step(Learner(model, CrossEntropy(), config), given)

    torch.testing.assert_close(stats.attacked, expected.clamp(0, 1))


def test_a_replay_of_free_goes_on_where_the_last_one_left_off(sample: Make):
    model, given = smooth_network(), sample()
    start = given.images + 0.5 * given.threat.eps
    learner = Learner(model, CrossEntropy(), AdversarialConfig(mode="free"))

    stats = take_step(learner, replace(given, start=start))

    moved = start + given.threat.eps * straight(model, given, start)
    expected = given.threat.project(moved, given.images)
    torch.testing.assert_close(stats.attacked, expected)


@pytest.mark.parametrize("beta", [0.5, 6.0])
def test_trades_is_the_clean_loss_and_the_divergence_of_the_worst_neighbour(
    beta: float, sample: Make
):
    model, given = smooth_network(), sample()
    config = AdversarialConfig(mode="trades", beta=beta, inner_steps=3)

    stats = take_step(Learner(model, CrossEntropy(), config), given)

    noise = keyed_noise(given.images, given.rows, key=given.key)
    start = given.threat.random_start(given.images, (noise + 1) / 2)
    answers = model(given.images).detach()
    worst = pgd(
        model, given.images, given.labels, threat=given.threat, steps=3, start=start,
        loss=lambda logits, labels: divergence(answers, logits, labels),
    )  # fmt: skip
    torch.testing.assert_close(stats.attacked, worst)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    clean = model(given.images)
    loss = F.cross_entropy(clean, given.labels)
    (loss + beta * divergence(clean, model(worst), given.labels).mean()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


@pytest.mark.parametrize("steps", [1, 4])
def test_pgd_training_takes_as_many_steps_as_it_is_told_from_a_random_start(
    steps: int, sample: Make
):
    model, given = smooth_network(), sample()
    config = AdversarialConfig(mode="pgd", inner_steps=steps)
    noise = keyed_noise(given.images, given.rows, key=given.key)
    start = given.threat.random_start(given.images, (noise + 1) / 2)

    stats = take_step(Learner(model, CrossEntropy(), config), given)

    expected = pgd(model, given.images, given.labels, threat=given.threat, steps=steps, start=start)
    torch.testing.assert_close(stats.attacked, expected)


@given_any(st.floats(0, 1))
def test_clean_and_attacked_images_share_the_loss_as_they_are_told(share: float):
    model, given = smooth_network(), build_sample()
    config = AdversarialConfig(mode="fused", clean_share=share)

    stats = take_step(Learner(model, CrossEntropy(), config), given)

    shown = given.images, stats.attacked
    clean, attacked = (F.cross_entropy(model(x), given.labels) for x in shown)
    expected = share * clean + (1 - share) * attacked
    assert float(stats.loss) == pytest.approx(float(expected.detach()))


def test_a_gradient_that_is_not_a_number_leaves_the_pixel_alone(tiny: Tiny, sample: Make):
    given = sample()
    images = given.images.clone()
    images[0, 0, 0, 0] = torch.nan
    learner = Learner(tiny().double(), CrossEntropy(), AdversarialConfig(mode="fused"))

    attacked = take_step(learner, replace(given, images=images)).attacked

    assert attacked is not None
    assert torch.equal(attacked[0, 0, 1:], images[0, 0, 1:].clamp(0, 1))
