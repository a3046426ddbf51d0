"""Model cards: reading, writing, and comparing them with shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark import __version__
from medspark.errors import UsageError
from medspark.models.card import CARD, ModelCard, read_card, write_card
from medspark.shards.manifest import Manifest

CLASSES = ("normal", "pneumonia", "other")
# Classes, whether any of them, channels: what network and images have to agree on.
MEANT = st.tuples(
    st.permutations(CLASSES).flatmap(lambda names: st.sampled_from([tuple(names), names[:2]])),
    st.booleans(),
    st.integers(1, 4),
)


def card_of(classes: tuple[str, ...], multi_label: bool, channels: int) -> ModelCard:
    return ModelCard(
        architecture="resnet50", classes=tuple(classes), multi_label=multi_label, height=8, width=8,
        channels=channels, mean=(0.5,) * channels, std=(0.25,) * channels,
    )  # fmt: skip


def manifest_of(classes: tuple[str, ...], multi_label: bool, channels: int) -> Manifest:
    return Manifest(
        digest="d", generation="g", classes=tuple(classes), multi_label=multi_label, height=16,
        width=16, channels=channels, bits=16, seed=0, splits={}, leak_check={}, source={},
    )  # fmt: skip


@given(mine=MEANT, theirs=MEANT)
def test_a_network_fits_images_of_its_classes_and_channels_and_no_others(mine, theirs) -> None:
    same = (tuple(mine[0]), *mine[1:]) == (tuple(theirs[0]), *theirs[1:])

    assert (card_of(*mine).misfit(manifest_of(*theirs)) == "") == same


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ((CLASSES[:2], False, 3), "one of normal, pneumonia in images of 3 channel(s)"),
        ((CLASSES[:2], True, 1), "any of normal, pneumonia in images of 1 channel(s)"),
        ((CLASSES[1::-1], False, 1), "one of pneumonia, normal in images of 1 channel(s)"),
    ],
)
def test_a_misfit_is_told_with_both_sides(theirs: tuple[tuple[str, ...], bool, int], said: str):
    misfit = card_of(CLASSES[:2], False, 1).misfit(manifest_of(*theirs))

    assert misfit == (
        "it predicts one of normal, pneumonia in images of 1 channel(s), but the shards hold "
        + said
    )


def test_a_card_comes_back_as_it_was_written_and_nothing_else_lies_there(tmp_path: Path) -> None:
    card = card_of(CLASSES, True, 3).model_copy(
        update={"temperature": 2.5, "bits": 16, "dropout": 0.3, "rendering": {"window": "lung"}}
    )
    (tmp_path / "model.safetensors").touch()

    write_card(tmp_path, card)

    assert read_card(tmp_path) == card
    assert {path.name for path in tmp_path.iterdir()} == {CARD, "model.safetensors"}


def test_a_card_without_what_came_later_is_read_with_the_usual_values(tmp_path: Path) -> None:
    """As the first version wrote it."""
    (tmp_path / "model.safetensors").touch()
    (tmp_path / CARD).write_text(
        '{"architecture": "resnet50", "classes": ["a", "b"], "channels": 1, "height": 224, '
        '"width": 200, "mean": [0.4], "std": [0.2]}'
    )

    card = read_card(tmp_path)

    assert (card.bits, card.multi_label, card.dropout, card.temperature) == (8, False, 0, 1)
    assert (card.height, card.width, card.rendering) == (224, 200, {})
    assert card.kind == "classifier"


def test_a_card_of_the_first_format_is_read_and_written_again_in_the_newest(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    later = {"kind", "exported", "pruning", "decision", "recalibrated", "denoiser"}
    old = card_of(CLASSES, False, 1).model_dump(mode="json", exclude=later)
    (tmp_path / CARD).write_text(json.dumps(old | {"schema_version": 1}))

    write_card(tmp_path, read_card(tmp_path))

    written = json.loads((tmp_path / CARD).read_text())
    assert written == old | {"schema_version": 2, "kind": "classifier"}


@pytest.mark.parametrize(
    ("changes", "unknown"),
    [
        ({"kind": "cascade", "stages": 2}, "kind 'cascade'"),
        ({"schema_version": 3}, "version 3"),
    ],
)
@pytest.mark.parametrize(
    ("writer", "needed"), [("9.1.0", "medspark 9.1.0 or newer"), ("\n rm", "a newer version")]
)
def test_a_card_of_a_later_kind_or_format_is_refused_with_the_version_that_is_needed(
    tmp_path: Path, changes: dict[str, Any], unknown: str, writer: str, needed: str
) -> None:
    (tmp_path / "model.safetensors").touch()
    card = card_of(CLASSES, False, 1).model_dump(mode="json") | {"medspark": writer} | changes
    (tmp_path / CARD).write_text(json.dumps(card))

    with pytest.raises(UsageError) as refusal:
        read_card(tmp_path)

    assert f"{unknown}, which medspark {__version__} does not know" in str(refusal.value)
    assert str(refusal.value).endswith(f"{needed}.")
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(("channels", "means", "deviations"), [(3, 1, 1), (1, 3, 3), (1, 1, 2)])
def test_every_channel_has_a_mean_and_a_deviation(
    tmp_path: Path, channels: int, means: int, deviations: int
) -> None:
    (tmp_path / "model.safetensors").touch()
    card = card_of(CLASSES, False, channels).model_copy(
        update={"mean": (0.5,) * means, "std": (0.5,) * deviations}
    )
    write_card(tmp_path, card)

    with pytest.raises(
        UsageError, match=rf"{channels} channel.* there are {means} and {deviations}"
    ):
        read_card(tmp_path)


DECISION = {
    "positive": "pneumonia", "threshold": 0.3, "criterion": "sensitivity", "target": 0.95,
    "sensitivity": {"right": 19, "images": 20}, "specificity": {"right": 9, "images": 20},
}  # fmt: skip


def test_a_decision_is_read_as_it_was_written(tmp_path: Path) -> None:
    card = card_of(CLASSES[:2], False, 1)
    card = ModelCard.model_validate(card.model_dump() | {"decision": DECISION})
    (tmp_path / "model.safetensors").touch()

    write_card(tmp_path, card)

    assert read_card(tmp_path).decision == card.decision
    assert read_card(tmp_path).positive == 1


@pytest.mark.parametrize(
    ("classes", "multi_label", "changed", "said"),
    [
        (CLASSES, False, {}, "a decision needs a model of two classes"),
        (CLASSES[:2], True, {}, "a decision needs a model of two classes"),
        (CLASSES[:2], False, {"positive": "other"}, "the decision's class 'other' is no class"),
        (CLASSES[:2], False, {"threshold": 1.0}, "decision.threshold"),
        (CLASSES[:2], False, {"target": None}, "sensitivity does not fit the target None"),
    ],
)
def test_a_decision_that_does_not_fit_is_refused(
    classes, multi_label, changed, said, tmp_path: Path
) -> None:
    card = card_of(classes, multi_label, 1).model_dump(mode="json", exclude_none=True)
    (tmp_path / CARD).write_text(json.dumps(card | {"decision": DECISION | changed}))

    with pytest.raises(UsageError, match=said):
        read_card(tmp_path)


def test_a_card_without_a_decision_has_no_field_that_earlier_versions_do_not_know(tmp_path):
    write_card(tmp_path, card_of(CLASSES[:2], False, 1))

    written = json.loads((tmp_path / CARD).read_text())
    assert not {"decision", "recalibrated"} & written.keys()
