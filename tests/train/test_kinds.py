"""A kind of network gets the recipe that it needs, and the user's keys win."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given as given_any
from hypothesis import strategies as st

from medspark.config import load_config
from medspark.train import loop
from medspark.train.config import DistillConfig, FitConfig, TrainConfig
from medspark.train.kinds import FINE_TUNING, KINDS, kind_of, recipe_line, with_recipe
from medspark.train.world import World
from medspark.workflows import train_at as jobs
from medspark.workflows.denoise import DenoiseTraining
from medspark.workflows.train_at import TrainAtConfig

RECIPES = {kind.name: kind.settings(None) for kind in KINDS}


def configured(name: str, *, weights: str | None = None, **train: Any) -> FitConfig:
    model = {"name": name, "weights": weights}
    return FitConfig.model_validate({"shards": "s", "model": model, "train": train})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vit_tiny_patch16_224", "vision transformer"),
        ("vit_tiny_patch8_224", "vision transformer"),
        ("deit_tiny_patch16_224", "vision transformer"),
        ("convnext_pico", "ConvNeXt"),
        ("convnextv2_pico", "ConvNeXt"),
        ("mobilenet_v2", None),
        ("resnet50", None),
    ],
)
def test_a_network_is_known_by_its_name(name: str, kind: str | None):
    found = kind_of(name)

    assert (found and found.name) == kind


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_setting_of_a_recipe_is_a_valid_one_of_train_that_differs(kind: Any):
    for weights in (None, "pretrained"):
        recipe = kind.settings(weights)
        train = TrainConfig.model_validate(recipe)
        assert all(getattr(train, key) != getattr(TrainConfig(), key) for key in recipe)


def test_a_network_with_weights_needs_fewer_epochs():
    fine_tuned = configured("convnext_pico")
    model = fine_tuned.model.model_copy(update={"weights": "pretrained"})

    assert with_recipe(fine_tuned).train.epochs == 24
    found = with_recipe(fine_tuned.model_copy(update={"model": model})).train
    assert (found.epochs, found.lr) == (6, 5e-4)


@given_any(st.sets(st.sampled_from(sorted(RECIPES["vision transformer"]))))
def test_what_the_user_set_wins_even_at_its_default(keys: set[str]):
    chosen = {key: getattr(TrainConfig(), key) for key in keys}

    found = with_recipe(configured("vit_tiny_patch16_224", **chosen)).train

    recipe = RECIPES["vision transformer"] | chosen
    assert {key: getattr(found, key) for key in recipe} == recipe
    assert found.mode == "fused_noise"


def test_a_second_call_changes_nothing():
    once = with_recipe(configured("convnext_pico"))

    assert with_recipe(once) is once
    assert recipe_line(once) == ""


def test_a_network_of_another_task_is_fine_tuned_against_attacks_by_a_recipe():
    config = configured("mobilenet_v2", weights="w.safetensors", ema=0.5)

    found = with_recipe(config)

    assert found.train == config.train.model_copy(update=FINE_TUNING | {"ema": 0.5})
    assert "fine-tuned against attacks with train.lr 0.0006" in recipe_line(config)
    assert "train.class_weights balanced" in recipe_line(config)
    assert with_recipe(found) is found


@pytest.mark.parametrize("mode", ["standard", "fused", "pgd", "trades"])
def test_other_modes_have_no_recipe_for_fine_tuning(mode: str):
    config = configured("mobilenet_v2", weights="w.safetensors", mode=mode)

    assert with_recipe(config) is config


def test_a_student_with_given_weights_learns_as_ever(tmp_path: Path):
    plain = configured("mobilenet_v2", weights="w.safetensors")
    config = plain.model_copy(update={"distill": DistillConfig(teacher=tmp_path)})

    assert with_recipe(plain) is not plain
    assert with_recipe(config) is config


def test_a_model_of_the_same_task_is_trained_on_as_ever(tmp_path: Path):
    config = configured("mobilenet_v2", weights=str(tmp_path))

    assert with_recipe(config) is config


def test_other_networks_train_as_ever():
    config = configured("resnet50")

    assert with_recipe(config) is config
    assert recipe_line(config) == ""


def test_keys_of_the_command_line_and_of_files_win(tmp_path: Path):
    file = tmp_path / "job.yaml"
    file.write_text("model: {name: vit_tiny_patch16_224}\ntrain: {batch_size: 32}\n")
    argv = ["--shards", "s", "--config", str(file), "--train.lr", "0.0003"]

    found = with_recipe(load_config(FitConfig, argv)).train

    assert (found.batch_size, found.lr, found.clip_grad) == (32, 3e-4, 1.0)


def test_one_line_says_what_was_chosen_and_the_run_keeps_it(
    tmp_path: Path,
    write_shards: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    seen: list[FitConfig] = []
    monkeypatch.setattr(loop, "trained", lambda config, *_: ({}, seen.append(config)))
    config = configured("vit_tiny_patch16_224", lr=1e-3)

    with caplog.at_level(logging.INFO):
        loop.fit(config, World(0, 0, 1, torch.device("cpu")), None)  # type: ignore[arg-type]

    (line,) = [record.getMessage() for record in caplog.records]
    assert "vision transformer" in line
    assert "train.batch_size 16" in line
    assert "train.lr" not in line
    assert (seen[0].train.batch_size, seen[0].train.lr) == (16, 1e-3)
    assert seen[0].digest() != config.digest()


def test_the_job_checks_and_hands_on_the_chosen_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class CheckedError(Exception):
        pass

    seen: list[TrainAtConfig] = []

    def check(config: TrainAtConfig) -> None:
        seen.append(config)
        raise CheckedError

    monkeypatch.setattr(jobs, "check", check)
    config = TrainAtConfig.model_validate({"model": {"name": "convnext_pico"}})

    with pytest.raises(CheckedError):
        jobs.train_at(config)

    assert seen[0].train.batch_size == RECIPES["ConvNeXt"]["batch_size"]


def test_a_denoiser_trains_alike_before_every_network():
    assert not DenoiseTraining.chooses_recipe
    assert TrainAtConfig.chooses_recipe
