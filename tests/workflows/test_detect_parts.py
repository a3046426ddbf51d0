"""The parts of a detection share no training image, and no patient decides twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medspark.shards.manifest import read_manifest
from medspark.shards.schema import read_patients
from medspark.workflows.detect_config import DetectConfig
from medspark.workflows.detect_parts import Parts


@pytest.fixture
def parts(write_shards) -> Parts:
    shards: Path = write_shards(rows=90, shards=3)
    fit = {"reference_images": 60, "contrast_images": 60, "validation_images": 80}
    config = DetectConfig.model_validate({"model": "m", "shards": shards, "fit": fit})
    return Parts(config, read_manifest(shards))


def with_fit(parts: Parts, **changes: object) -> Parts:
    fit = parts.config.fit.model_copy(update=changes)
    return replace(parts, config=parts.config.model_copy(update={"fit": fit}))


def test_with_few_training_images_half_of_them_are_left_to_learn_attacks_from(parts) -> None:
    reference, contrast = parts.rows("reference"), parts.rows("contrast")

    assert len(reference) == len(contrast) == 45
    assert not set(reference) & set(contrast)


def test_validation_images_choose_or_calibrate_by_patient(parts: Parts, monkeypatch) -> None:
    def three_each(path: Path) -> np.ndarray:
        return np.array([f"{name.split('-')[0]}-{int(name.split('-')[1]) // 3}"
                         for name in read_patients(path)])  # fmt: skip

    monkeypatch.setattr("medspark.workflows.detect_parts.read_patients", three_each)
    choosing, patients = parts.choosing(), parts.of_images(three_each, "validation")

    assert not set(patients[choosing]) & set(patients[~choosing])
    assert 0.4 < choosing.mean() < 0.6


def test_what_is_read_of_images_is_in_the_order_of_their_rows(parts: Parts) -> None:
    found = parts.of_images(read_patients, "validation")

    assert found.tolist() == [f"val-{row}" for row in parts.rows("validation")]


def test_detectors_learn_from_one_attack_at_budgets_of_its_own(parts: Parts) -> None:
    own = with_fit(parts, eps=(8 / 255,))

    assert own.attacks("contrast").attacks == ("pgd",)
    assert own.attacks("contrast").eps == (8 / 255,)
    assert own.attacks("validation").eps == own.attacks("test").eps == (2 / 255,)
    assert parts.attacks("reference").attacks == ()


def test_what_is_left_out_in_turn_is_made_for_the_contrast_images(parts: Parts) -> None:
    attacks = with_fit(parts, left_out=True, eps=(8 / 255,)).attacks("contrast")

    assert set(attacks.attacks) == {"fgsm", "pgd", "cw"}
    assert attacks.eps == (8 / 255, 2 / 255)
