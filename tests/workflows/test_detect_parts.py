"""The parts of a detection share no training image, and no patient decides twice."""

from __future__ import annotations

from collections.abc import Callable
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


def patients_of(size: int) -> Callable[[Path], np.ndarray]:
    """Return what names the patients of a shard, each with ``size`` images."""

    def read(path: Path) -> np.ndarray:
        numbers = [name.split("-") for name in read_patients(path)]
        return np.array([f"{split}-{int(number) // size}" for split, number in numbers])

    return read


def test_validation_images_choose_or_calibrate_by_patient(parts: Parts, monkeypatch) -> None:
    three_each = patients_of(3)
    monkeypatch.setattr("medspark.workflows.detect_parts.read_patients", three_each)

    choosing, calibrating = (
        parts.of_images(three_each, part) for part in ("choosing", "calibration")
    )

    assert not set(choosing) & set(calibrating)
    assert len(choosing) + len(calibrating) == 80
    assert 32 < len(choosing) < 48


def test_images_of_a_single_patient_are_halved_themselves_and_the_log_says_so(
    parts: Parts, monkeypatch, caplog
) -> None:
    monkeypatch.setattr("medspark.workflows.detect_parts.read_patients", patients_of(1000))

    choosing, calibrating = parts.rows("choosing"), parts.rows("calibration")

    assert len(choosing) == len(calibrating) == 40
    assert not set(choosing) & set(calibrating)
    assert caplog.text.count("all 80 validation images are of one patient") == 1


def test_only_the_choosing_half_is_attacked(parts: Parts) -> None:
    assert parts.attacks("choosing").attacks == ("fgsm", "pgd", "cw")
    assert parts.attacks("calibration").attacks == ()


def test_a_bound_draws_from_the_choosing_half_and_leaves_the_other_as_it_is(parts: Parts) -> None:
    bounded = with_fit(parts, choosing_images=12)
    few, all_of_them = bounded.rows("choosing"), parts.rows("choosing")

    assert len(few) == 12
    assert set(few) < set(all_of_them)
    assert few.tolist() == sorted(few)
    assert few.tolist() != all_of_them[:12].tolist()
    assert np.array_equal(bounded.rows("calibration"), parts.rows("calibration"))
    assert np.array_equal(with_fit(parts, choosing_images=999).rows("choosing"), all_of_them)


def test_what_is_read_of_images_is_in_the_order_of_their_rows(parts: Parts) -> None:
    found = parts.of_images(read_patients, "choosing")

    assert found.tolist() == [f"val-{row}" for row in parts.rows("choosing")]


def test_detectors_learn_from_attacks_of_their_own_at_their_own_budgets(parts: Parts) -> None:
    own = with_fit(parts, attacks=("pgd", "deepfool"), eps=(8 / 255,))

    assert own.attacks("contrast").attacks == ("pgd", "deepfool")
    assert own.attacks("contrast").eps == (8 / 255,)
    assert own.attacks("choosing").eps == own.attacks("test").eps == (2 / 255,)
    assert parts.attacks("reference").attacks == ()


def test_what_is_left_out_in_turn_is_made_for_the_contrast_images(parts: Parts) -> None:
    attacks = with_fit(parts, left_out=True, eps=(8 / 255,)).attacks("contrast")

    assert set(attacks.attacks) == {"fgsm", "pgd", "deepfool", "cw"}
    assert attacks.eps == (8 / 255, 2 / 255)
