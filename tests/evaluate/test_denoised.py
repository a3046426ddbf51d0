"""A network behind a denoiser, evaluated: attacks of its own, and the quality of its images."""

from __future__ import annotations

import pytest
import torch
from guarded_networks import build_guarded
from torch import nn

from medspark.attacks.config import OF_DENOISED
from medspark.errors import UsageError
from medspark.evaluate.config import AttackSettings, check_attacks, through_denoiser
from medspark.evaluate.quality import psnr, ssim
from medspark.evaluate.report import table
from medspark.evaluate.result import RobustnessResult
from medspark.evaluate.robust import Batch, evaluate

SETTINGS = AttackSettings(
    attacks=through_denoiser(("fgsm", "pgd")), eps=(0.0, 8 / 255), steps=2, sanity_images=0
)


@pytest.fixture(scope="module")
def batch() -> Batch:
    images = torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(2))
    return images, torch.arange(6) % 2, torch.arange(6)


@pytest.fixture(scope="module")
def result(batch: Batch) -> RobustnessResult:
    return evaluate(build_guarded(), [batch], SETTINGS)


def test_every_condition_says_how_near_denoised_images_are_to_clean_ones(
    result: RobustnessResult, batch: Batch
) -> None:
    images, network = batch[0], build_guarded()
    denoised = network.denoiser(images)

    assert result.clean.psnr == pytest.approx(psnr(denoised, images).mean().item(), rel=1e-5)
    assert result.clean.ssim == pytest.approx(ssim(denoised, images).mean().item(), rel=1e-5)
    for attack in result.attacks:
        same = attack.eps == 0
        assert (attack.psnr == pytest.approx(result.clean.psnr, rel=1e-5)) is same
    assert {"clean/psnr", "bpda_pgd/eps_8_255/ssim"} <= {figure.name for figure in result.figures()}


def test_the_table_shows_the_quality_of_denoised_images_and_only_of_these(
    result: RobustnessResult, batch: Batch
) -> None:
    plain = evaluate(
        nn.Sequential(nn.Flatten(), nn.Linear(1024, 2)), [batch],
        SETTINGS.model_copy(update={"attacks": ("fgsm",)}),
    )  # fmt: skip

    assert table(result)[0][-2:] == ["PSNR denoised", "SSIM denoised"]
    assert len({len(row) for row in table(result)}) == 1
    assert table(plain)[0][-1] == "success"
    assert plain.clean.psnr is None


def test_an_attacker_who_knows_less_is_expected_to_do_less_harm(result: RobustnessResult) -> None:
    names = {flag.name for flag in result.flags}

    assert "unguarded_pgd_beats_white_box" in names
    assert "bpda_pgd_beats_white_box" not in names  # it knows the denoiser, and counts as white-box


def test_attacks_on_denoisers_are_added_once_and_to_attacks_alone() -> None:
    assert through_denoiser(("pgd", "bpda_pgd")) == ("pgd", "bpda_pgd", "unguarded_pgd")
    assert through_denoiser(()) == ()


@pytest.mark.parametrize("name", OF_DENOISED)
def test_attacks_on_denoisers_refuse_other_networks(name: str) -> None:
    check_attacks([name], gradients=True, surrogates=0, denoised=True)

    with pytest.raises(UsageError, match=f"{name} can attack a model with a denoiser only"):
        check_attacks([name], gradients=True, surrogates=0)
