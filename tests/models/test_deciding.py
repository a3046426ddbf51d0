"""Where a model decides: by its threshold, in labels and in the logits that attacks see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from medspark.models.card import Decision, ModelCard, Rate
from medspark.models.deciding import deciding
from medspark.models.prediction import answer_of, calibrated, decided

RATE = Rate(right=1, images=2)


def card_of(threshold: float | None, *, positive: str = "b", **more: Any) -> ModelCard:
    decision = threshold and Decision(
        positive=positive, threshold=threshold, criterion="youden", sensitivity=RATE,
        specificity=RATE,
    )  # fmt: skip
    given = {
        "architecture": "resnet50", "classes": ("a", "b"), "channels": 1, "height": 8, "width": 8,
        "mean": (0.5,), "std": (0.25,), "decision": decision or None,
    }  # fmt: skip
    return ModelCard.model_validate(given | more)


LOGITS = st.lists(st.tuples(st.floats(-40, 40), st.floats(-40, 40)), min_size=1, max_size=9)


@given(
    logits=LOGITS,
    threshold=st.floats(0.001, 0.999),
    temperature=st.floats(0.2, 20),
    positive=st.sampled_from("ab"),
)
def test_the_largest_logit_is_the_label_by_the_threshold(
    logits, threshold: float, temperature: float, positive: str
) -> None:
    card = card_of(threshold, positive=positive, temperature=temperature)
    values = np.array(logits, dtype=np.float32)
    yes = "ab".index(positive)
    odds = (values[:, yes] - values[:, 1 - yes]).astype(float) / temperature
    clear = np.abs(odds - np.log(threshold / (1 - threshold))) > 1e-3

    labels = np.array(decided(calibrated(values, card), card))
    network = deciding(nn.Identity(), card)(torch.from_numpy(values)).argmax(1).numpy()

    wanted = np.where(odds > np.log(threshold / (1 - threshold)), positive, "ab"[1 - yes])
    unsaturated = clear & (np.abs(odds) < 80)  # a probability of 0 in float32 tells nothing apart
    assert (labels == wanted)[unsaturated].all()
    assert (np.array(card.classes)[network] == wanted)[clear].all()


@given(LOGITS)
def test_without_a_decision_the_likeliest_class_is_the_label(logits) -> None:
    card, values = card_of(None), np.array(logits, dtype=np.float32)
    likely = calibrated(values, card)

    assert decided(likely, card) == [card.classes[k] for k in likely.argmax(1)]
    network = nn.Identity()
    assert deciding(network, card) is network


def test_an_answer_gives_the_probability_of_its_label_be_it_the_smaller_one() -> None:
    row = np.array([0.8, 0.2], dtype=np.float32)

    assert answer_of(row, card_of(0.1)) == {
        "label": "b", "probability": pytest.approx(0.2), "a": pytest.approx(0.8),
        "b": pytest.approx(0.2),
    }  # fmt: skip
    assert answer_of(row, card_of(None))["label"] == "a"


def test_attacks_on_a_deciding_network_have_its_gradients_and_only_if_it_has_some() -> None:
    black_box = nn.Identity()
    black_box.gradients = False

    assert deciding(nn.Identity(), card_of(0.3)).gradients
    assert not deciding(black_box, card_of(0.3)).gradients
