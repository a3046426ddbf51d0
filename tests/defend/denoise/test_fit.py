"""A whole training of a denoiser in one process: what it keeps, judges, and resumes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bright_halves import SIDE, pictures, save_network, write_halves

from medspark.defend.denoise.config import DenoiseFit
from medspark.defend.denoise.fit import fit
from medspark.defend.denoise.result import DenoiseResult
from medspark.defend.detect.guard import load_guard
from medspark.defend.detect.result import AdaptiveFigures
from medspark.defend.detect.served import GuardedPredictor
from medspark.errors import UsageError
from medspark.models.checkpoint import load_classifier
from medspark.models.guarded import GuardedClassifier
from medspark.train.config import FitConfig
from medspark.train.loop import fit as train
from medspark.train.world import World

ALONE = World(0, 0, 1, torch.device("cpu"))


class Silent:
    """Records nothing, and may end the training at a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self._stop_at = stop_at

    def record(self, step: int, metrics: object) -> None:
        if step == self._stop_at:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("denoise")
    write_halves(folder / "shards")
    save_network(folder / "network")
    return folder


def settings(home: Path, name: str, **more: Any) -> DenoiseFit:
    shape = {"grid": 4, "width": 16, "depth": 1, "heads": 2, "stem": 4, "embedding": 8}
    return DenoiseFit.model_validate(
        {
            "shards": home / "shards",
            "run_dir": home / name,
            "model": {"name": "test_resnet", "weights": str(home / "network")},
            "attack": {"eps": "16/255"},
            "denoise": {"shape": shape, "attacks": ["fgsm", "noise"]},
            "train": {"epochs": 2, "batch_size": 32, "lr": 0.01, "validation_steps": 1},
            "evaluate": {
                "attacks": ["fgsm", "pgd", "bpda_pgd", "unguarded_pgd"],
                "eps": ["16/255"],
                "steps": 2,
                "sanity_images": 4,
            },
            "judge": {
                "action": "refuse",
                "fpr": 0.1,
                "adaptive": {"attacks": ["selective"], "steps": 2},
            },
        }
        | more
    )


@pytest.fixture(scope="module")
def done(home: Path) -> DenoiseResult:
    return DenoiseResult.model_validate(fit(settings(home, "run"), ALONE, Silent()))


def test_the_kept_model_is_guarded_and_its_classifier_answers_as_the_given_one(
    done: DenoiseResult, home: Path
) -> None:
    guarded, given = load_classifier(Path(done.model)), load_classifier(home / "network")
    images = torch.from_numpy(pictures("test")[0]).permute(0, 3, 1, 2) / 255

    assert isinstance(guarded, GuardedClassifier)
    assert torch.allclose(guarded.classify(images), given(images), atol=1e-4)
    assert not torch.equal(guarded.denoiser(images), images)


def test_all_attacks_stand_in_one_table_with_the_quality_of_denoised_images(
    done: DenoiseResult,
) -> None:
    assert [a.name for a in done.attacks] == ["fgsm", "pgd", "bpda_pgd", "unguarded_pgd"]
    assert all(0 < (of.psnr or 0) <= 100 and of.ssim for of in (done.clean, *done.attacks))
    lines = "\n".join(done.more_lines())
    assert "| unguarded_pgd | 16/255 |" in lines
    assert "adaptive wrong and undetected" in lines


def test_every_figure_of_the_detector_stands_beside_the_adaptive_one(done: DenoiseResult) -> None:
    assert {each.attack for each in done.detectors} == {"fgsm", "pgd", "bpda_pgd", "unguarded_pgd"}
    for each in done.detectors:
        assert (each.name, each.layer) == ("contrastive", "contrast")
        assert isinstance(each.adaptive, AdaptiveFigures)
        assert "selective through contrastive:contrast" in each.adaptive.attacks
    assert "detector/adaptive/auroc" in done.more_metrics()


def test_the_guard_beside_the_weights_flags_the_reported_share_and_refuses(
    done: DenoiseResult,
) -> None:
    answers = GuardedPredictor.load(Path(done.model)).answers(pictures("test")[0])
    refused = [set(answer) == {"suspicious", "p_value"} for answer in answers]

    assert load_guard(Path(done.guard))[0].false_positive_rate == 0.1
    assert sum(refused) / len(refused) == done.false_positives.rate
    assert set(done.false_positives.sites) == {"north", "south"}
    assert refused == [answer["suspicious"] for answer in answers]


def test_a_guard_of_another_network_is_refused(done: DenoiseResult, tmp_path: Path) -> None:
    copy = shutil.copytree(done.model, tmp_path / "model")
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)

    with pytest.raises(UsageError, match="was fitted on another network"):
        GuardedPredictor.load(copy)


def test_a_resumed_training_ends_with_the_same_weights_and_figures(
    done: DenoiseResult, home: Path
) -> None:
    config = settings(home, "cut", checkpoint={"every_steps": 2})
    with pytest.raises(KeyboardInterrupt):
        fit(config, ALONE, Silent(stop_at=5))

    again = DenoiseResult.model_validate(fit(config, ALONE, Silent()))

    one, other = (load_classifier(Path(result.model)).state_dict() for result in (done, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [d.as_json() for d in again.detectors] == [d.as_json() for d in done.detectors]


def test_the_last_epoch_is_kept_since_scores_do_not_choose(done: DenoiseResult) -> None:
    assert done.validation is not None
    assert (done.validation.epoch, done.mode, done.architecture) == (2, "denoise", "test_resnet")


def test_a_guarded_model_cannot_be_guarded_again(done: DenoiseResult, home: Path) -> None:
    weights = {"name": "test_resnet", "weights": done.model}

    with pytest.raises(UsageError, match="holds a model of kind guarded"):
        fit(settings(home, "twice", model=weights), ALONE, Silent())


def test_a_guarded_model_is_fine_tuned_as_one_network(done: DenoiseResult, home: Path) -> None:
    result = train(
        FitConfig.model_validate(
            {
                "shards": home / "shards",
                "run_dir": home / "tuned",
                "model": {"name": "test_resnet", "weights": done.model},
                "train": {"epochs": 1, "validation_steps": 1, "monitor": {"action": "off"}},
                "evaluate": {"attacks": ["fgsm"], "eps": ["16/255"], "sanity_images": 0},
            }
        ),
        ALONE,
        Silent(),
    )

    tuned, before = load_classifier(Path(result["model"])), load_classifier(Path(done.model))
    assert isinstance(tuned, GuardedClassifier)
    changed = {
        name.split(".")[0]
        for name, value in tuned.state_dict().items()
        if not torch.equal(value, before.state_dict()[name])
    }
    assert changed == {"denoiser", "backbone"}
    assert np.isfinite(result["clean"]["psnr"])
    assert tuned.denoiser.size == (SIDE, SIDE)
