"""With two batch norms, attacked images leave the clean ones' statistics alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from medspark.models.classifier import Classifier
from medspark.train.adversarial import take_step
from medspark.train.config import AdversarialConfig
from medspark.train.dual_norm import DualNorm, dual, for_attacked
from medspark.train.learner import Learner, Sample
from medspark.train.objective import CrossEntropy

Tiny = Callable[..., Classifier]
Make = Callable[..., Sample]


def layers(model: Classifier) -> list[DualNorm]:
    return [module for module in model.modules() if isinstance(module, DualNorm)]


@pytest.mark.parametrize("mode", ["naive", "fused", "fused_noise", "trades"])
def test_each_norm_sees_its_own_images(mode: str, tiny: Tiny, sample: Make):
    doubled = dual(tiny().double().train(), deployed="main")
    config = AdversarialConfig(mode=mode, dual_bn=True, clean_share=0.5, inner_steps=2)

    take_step(Learner(doubled.trained, CrossEntropy(), config), sample())

    for layer in layers(doubled.trained):
        main, auxiliary = layer.main, layer.auxiliary
        assert int(auxiliary.num_batches_tracked) == 1
        assert not torch.equal(main.running_mean, auxiliary.running_mean)
        assert main.weight.grad.abs().sum() > 0
        assert auxiliary.weight.grad.abs().sum() > 0
        assert not torch.equal(main.weight.grad, auxiliary.weight.grad)


@pytest.mark.parametrize(
    ("mode", "clean", "attacked"),
    [("naive", 2, 1), ("fused", 1, 1), ("fused_noise", 1, 1), ("trades", 4, 1)],
)
def test_step_after_step_each_norm_counts_its_own_passes(
    mode: str, clean: int, attacked: int, tiny: Tiny, sample: Make
):
    doubled = dual(tiny().double().train(), deployed="main")
    config = AdversarialConfig(mode=mode, dual_bn=True, inner_steps=2)
    learner = Learner(doubled.trained, CrossEntropy(), config)

    for step in (1, 2):
        take_step(learner, sample())

        for layer in layers(doubled.trained):
            assert int(layer.main.num_batches_tracked) == clean * step
            assert int(layer.auxiliary.num_batches_tracked) == attacked * step


def test_after_an_error_the_main_norms_are_used_again(tiny: Tiny):
    doubled = dual(tiny(), deployed="main")

    with pytest.raises(ZeroDivisionError), for_attacked(doubled.trained):
        assert all(layer.attacked for layer in layers(doubled.trained))
        raise ZeroDivisionError

    assert not any(layer.attacked for layer in layers(doubled.trained))


def test_what_one_norm_learns_the_other_does_not(tiny: Tiny):
    model = tiny()
    doubled = dual(model, deployed="main")
    for layer in layers(doubled.trained):
        layer.auxiliary.weight.data.add_(1)

    assert all((layer.main.weight == 1).all() for layer in layers(doubled.trained))
    assert not any("auxiliary" in name for name in model.state_dict())


@pytest.mark.parametrize("deployed", ["main", "auxiliary"])
def test_the_kept_network_answers_with_the_deployed_norm(deployed: str, tiny: Tiny, sample: Make):
    doubled = dual(tiny().double(), deployed=deployed)
    for layer in layers(doubled.trained):
        layer.main.running_mean.fill_(0.1)
        layer.auxiliary.running_mean.fill_(0.3)
    doubled.trained.eval()
    for layer in layers(doubled.trained):
        layer.attacked = deployed == "auxiliary"
    images = sample().images

    kept = doubled.unfold().eval()

    assert torch.equal(kept(images), doubled.trained(images))
    assert not layers(kept)


def test_before_training_both_norms_are_the_networks_own(tiny: Tiny, sample: Make):
    model = tiny().double().eval()
    expected = model(sample().images)

    doubled = dual(model, deployed="auxiliary")

    assert torch.equal(doubled.trained.eval()(sample().images), expected)
