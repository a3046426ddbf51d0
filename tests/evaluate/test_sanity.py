"""One rule decides a flag, and a flag says what it was measured on."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medspark.evaluate import sanity
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.result import RobustnessResult
from medspark.evaluate.robust import evaluate
from medspark.evaluate.sanity import PROBE_STEPS, PROBED_IMAGES, Flag, SanityConfig
from medspark.evaluate.summary import Trial, flags
from medspark.workflows.evaluate_config import EvaluationConfig
from medspark.workflows.paper_plan import TableEvaluation

FLAG = Flag(name="f", triggered=True, value=1.0, threshold=0.5, sentence="it is seen")


@given(st.integers(1, 10**6), st.none() | st.integers(0, 64), st.none() | st.integers(0, 100))
def test_what_a_flag_was_measured_on_is_in_its_fields_and_in_its_sentence(
    images: int, levels: int | None, steps: int | None
) -> None:
    eps = None if levels is None else levels / 255
    flag = FLAG.measured_on(images, eps=eps, steps=steps)

    assert (flag.images, flag.eps, flag.steps) == (images, eps, steps or None)
    assert flag.sentence.startswith(f"it is seen (measured on {images} images")
    assert (f"eps {levels}/255" in flag.sentence) == bool(levels)
    assert (f"{steps} steps" in flag.sentence) == bool(steps)


@pytest.mark.parametrize("settings", [AttackSettings, EvaluationConfig, TableEvaluation])
def test_every_report_probes_as_many_images_by_default(settings: type) -> None:
    assert settings.model_fields["sanity_images"].default == PROBED_IMAGES


def test_flags_are_the_same_however_many_steps_the_reports_own_pgd_takes(
    plain_network, digits
) -> None:
    batch = digits.test_images[:60], digits.test_labels[:60], torch.arange(60)

    def found(steps: int) -> dict[str, Flag]:
        config = AttackSettings(attacks=("fgsm",), eps=(0.05, 0.1), steps=steps, sanity_images=40)
        return {flag.name: flag for flag in evaluate(plain_network, [batch], config).flags}

    assert found(1) == found(3)
    flag = found(1)["fgsm_far_above_margin_pgd"]
    assert (flag.images, flag.eps, flag.steps) == (40, 0.1, PROBE_STEPS)


def test_each_flag_is_measured_on_the_images_that_it_saw() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6]])
    trials = [Trial("fgsm", 1, 2 / 255), Trial("pgd", 7, 2 / 255)]
    arrays = {
        "rows": np.arange(4), "labels": np.array([0, 1, 0, 1]), "clean": probabilities,
        "noise": probabilities, "fgsm@2": probabilities, "pgd@2": probabilities,
        "margin_held": np.array([1, 0, 1, np.nan]), "unsteady": np.array([0, 0, 0, np.nan]),
    }  # fmt: skip

    found = {flag.name: flag for flag in flags(arrays, trials, SanityConfig())}

    measured = {name: (flag.images, flag.steps) for name, flag in found.items()}
    assert measured["same_class_for_all"] == (4, None)
    assert measured["pgd_not_falling_with_eps"] == (4, 7)
    assert measured["answers_not_repeatable"] == (3, None)
    assert measured["fgsm_far_above_margin_pgd"] == (3, PROBE_STEPS)
    assert measured["pgd_far_above_margin_pgd"] == (3, PROBE_STEPS)
    assert measured["noise_as_strong_as_pgd"] == (3, 7)
    assert "under PGD-7 on the cross-entropy" in found["pgd_far_above_margin_pgd"].sentence


def test_a_result_of_an_earlier_version_has_flags_that_say_nothing_of_what_they_saw() -> None:
    before = {"name": "f", "triggered": True, "value": 1, "threshold": 0.5, "sentence": "x"}
    document = {"images": 1, "clean": {}, "flags": [before, before | {"triggered": False}]}

    (flag,) = RobustnessResult.model_validate(document).triggered_flags

    assert (flag.sentence, flag.images, flag.eps, flag.steps) == ("x", None, None, None)


def test_flags_of_the_clean_answers_are_flags_that_there_are() -> None:
    source = inspect.getsource(sanity)

    for name in sanity._OF_CLEAN_ANSWERS:
        assert source.count(f'"{name}"') == 2  # declared so, and raised
