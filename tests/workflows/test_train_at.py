"""A finished run is recognised by what decides its weights and by what was asked of it."""

from __future__ import annotations

from typing import Any

import pytest

from medspark.workflows.train_at import TrainAtConfig, _digests

OTHER = {
    "baseline": True,
    "data": {"prefetch": 9, "share": 0.5},
    "evaluate": {"steps": 3, "sanity_images": 128},
    "attack": {"eps": "4/255"},
}


@pytest.mark.parametrize(
    ("settings", "run", "asked"),
    [
        (
            {"evaluate": {"sanity_images": 128}},  # the default of those versions
            "6e997279c962513ea4b16b4e3c815706ae55ea6fb1bfde1bb245cf5974209ca9",
            "b76f70cffe3d060fd55f5d0c01f4eb2ad1022ac9541ba3e20fdd1ad648fc55ba",
        ),
        (
            OTHER,
            "9b787f0b4fd82133246ab7d88e9df66417927d8a8f01f5c449113eb56e381f77",
            "bf2712784a08b08c7f04625a6576bb7af9c6d900b3091e79f277322bfe733ee3",
        ),
    ],
)
def test_results_that_earlier_versions_kept_are_recognised(
    settings: dict[str, Any], run: str, asked: str
) -> None:
    assert _digests(TrainAtConfig.model_validate(settings)) == {"run": run, "asked": asked}


def test_a_result_of_128_probed_images_is_not_taken_for_one_of_the_default() -> None:
    now, before = (
        _digests(TrainAtConfig.model_validate({"evaluate": evaluate}))
        for evaluate in ({}, {"sanity_images": 128})
    )

    assert now["run"] == before["run"]
    assert now["asked"] != before["asked"]


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"run_dir": "x", "launch": {"processes": 2}, "checkpoint": {"keep": 9}}, {"run", "asked"}),
        ({"evaluate": {"steps": 3}}, {"run"}),
        ({"data": {"prefetch": 9}}, {"run"}),
        ({"baseline": True}, set()),
        ({"seed": 1}, set()),
        ({"demo": {"count": 300}}, set()),
    ],
)
def test_a_run_is_another_one_by_its_weights_and_a_result_by_all_that_was_asked(
    settings: dict[str, Any], same: set[str]
) -> None:
    before = _digests(TrainAtConfig())
    after = _digests(TrainAtConfig.model_validate(settings))

    assert {name for name in before if before[name] == after[name]} == same
