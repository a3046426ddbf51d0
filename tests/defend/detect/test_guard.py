"""A guard is kept without pickle, comes back as it was, and refuses changed files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from made_features import WIDTH, drawn, training

from medspark.defend.detect.combination import combine
from medspark.defend.detect.detector import Detector
from medspark.defend.detect.guard import Guard, load_guard, save_guard
from medspark.defend.detect.registry import DETECTORS
from medspark.errors import UsageError

TRAINING, SHOWN = training(), drawn(20, 7)
SINGLES = {name: cls.fit("a", TRAINING) for name, cls in DETECTORS.items()}
FITTED: dict[str, Detector] = SINGLES | {
    "combination": combine([*SINGLES.values(), SINGLES["kde"]], TRAINING)
}


def guard_of(detector: Detector) -> Guard:
    calibration = detector.score(drawn(99, 8)).double().numpy()
    return Guard(detector, calibration, 0.05, "refuse")


def saved(folder: Path, detector: Detector) -> Guard:
    guard = guard_of(detector)
    folder.mkdir(exist_ok=True)
    save_guard(folder, guard, features=SHOWN, head="head", network="0" * 64)
    return guard


@pytest.mark.parametrize("name", FITTED)
def test_a_guard_comes_back_with_every_score_and_p_value(name: str, tmp_path: Path) -> None:
    guard = saved(tmp_path, FITTED[name])

    again, card = load_guard(tmp_path)

    scores = guard.detector.score(SHOWN)
    assert torch.equal(again.detector.score(SHOWN), scores)
    assert np.array_equal(again.p_values(scores.numpy()), guard.p_values(scores.numpy()))
    assert (again.action, again.false_positive_rate) == ("refuse", 0.05)
    assert (card.head, card.widths["a"], card.network) == ("head", WIDTH, "0" * 64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["guard.json", "guard.safetensors"]


def test_what_is_suspicious_has_a_p_value_of_at_most_the_rate() -> None:
    guard = guard_of(FITTED["mahalanobis"])
    scores = guard.detector.score(drawn(200, 9, shift=1.0)).double().numpy()

    suspicious = guard.suspicious(scores)

    assert np.array_equal(suspicious, guard.p_values(scores) <= 0.05)
    assert 0 < suspicious.mean() < 1


def test_changed_arrays_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, FITTED["kde"])
    file = tmp_path / "guard.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)

    with pytest.raises(UsageError, match="has been changed since its guard was written"):
        load_guard(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"action": "erase"}, "action"),
        ({"schema_version": 2}, "schema_version"),
        ({"detector": {"name": "no_such"}}, "does not hold the detectors"),
        ({"detector": {"name": "lid", "numbers": {}}}, "does not hold the detectors"),
        ({"widths": {"a": WIDTH + 1}}, "do not fit its card"),
        ({"widths": {}}, "do not fit its card"),
    ],
)
def test_a_card_that_does_not_fit_is_one_sentence(tmp_path: Path, change, sentence) -> None:
    saved(tmp_path, FITTED["kde"])
    path = tmp_path / "guard.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    with pytest.raises(UsageError, match=sentence) as raised:
        load_guard(tmp_path)

    assert str(raised.value).count("\n") == 0


def test_a_folder_without_a_guard_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a guard: it has no guard\.json"):
        load_guard(tmp_path)
