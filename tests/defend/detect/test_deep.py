"""The detector of all layers has a machine for each attack that it learns from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from made_features import drawn, training
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from medspark.defend.detect.choose import fit_all, training_of
from medspark.defend.detect.deep import DeepFeatures
from medspark.defend.detect.detector import ALL_LAYERS
from medspark.defend.detect.features import LOGITS, joined
from medspark.evaluate.summary import Trial

LAYERS = ("a", "b")
ATTACKS = tuple(drawn(60, seed, shift=shift, layers=LAYERS) for seed, shift in ((3, 2), (4, -2)))
TRAINING = replace(training(layers=LAYERS), attacked=ATTACKS)
SHOWN = drawn(20, 7, layers=LAYERS)


def rows(features) -> np.ndarray:
    return np.concatenate([features.layers[name].numpy() for name in LAYERS], axis=1)


def test_the_score_is_the_highest_answer_of_scikit_learns_machines():
    detector = DeepFeatures.fit(ALL_LAYERS, TRAINING)
    honest = rows(joined([TRAINING.clean, TRAINING.noisy]))
    scaler = StandardScaler().fit(np.concatenate([honest, *map(rows, ATTACKS)]))
    answers = []
    for attack in ATTACKS:
        machine = SVC(C=10, gamma=detector.gamma, class_weight="balanced")
        truth = np.arange(len(honest) + 60) >= len(honest)
        machine.fit(scaler.transform(np.concatenate([honest, rows(attack)])), truth)
        answers.append(machine.decision_function(scaler.transform(rows(SHOWN))))

    assert detector.score(SHOWN).numpy() == pytest.approx(np.max(answers, axis=0), abs=1e-3)
    assert detector.gamma == pytest.approx(1 / 10, rel=1e-3)  # one by ten standardised features


def test_attacks_on_either_side_are_both_known():
    detector = DeepFeatures.fit(ALL_LAYERS, TRAINING)
    clean = detector.score(drawn(90, 21, layers=LAYERS))

    for shift in (2.0, -2.0):
        attacked = detector.score(drawn(90, 22, shift=shift, layers=LAYERS))
        scores = torch.cat([clean, attacked]).numpy()
        assert roc_auc_score([0] * 90 + [1] * 90, scores) > 0.9


def test_it_reads_every_layer_of_one_pass_and_no_other():
    training_with_components = replace(
        TRAINING, reference=drawn(120, 0, layers=("a", "uncentred", "b", "centred"))
    )

    assert DeepFeatures.fit(ALL_LAYERS, training_with_components).layers == LAYERS


def test_a_feature_that_never_varied_says_nothing():
    def still(features):
        changed = torch.cat([features.layers["a"], torch.full((len(features.logits), 1), 3.0)], 1)
        return replace(features, layers={"a": changed, "b": features.layers["b"]})

    same = replace(
        TRAINING,
        reference=still(TRAINING.reference),
        clean=still(TRAINING.clean),
        noisy=still(TRAINING.noisy),
        attacked=tuple(map(still, ATTACKS)),
    )
    detector, shown = DeepFeatures.fit(ALL_LAYERS, same), still(SHOWN)
    other = replace(shown, layers={**shown.layers, "a": shown.layers["a"].clone()})
    other.layers["a"][:, -1] = 7.0

    assert torch.equal(detector.score(shown), detector.score(other))


def test_the_combination_has_no_part_of_all_layers():
    detectors = fit_all([("kde", "a"), ("lid", "b"), ("deep", ALL_LAYERS)], TRAINING)

    assert [part.name for part in detectors[-1].detectors] == ["kde", "lid"]


def test_trials_of_one_attack_at_several_budgets_are_one_attack():
    logits, wrong = np.eye(3)[np.arange(30) % 3], np.eye(3)[(np.arange(30) + 1) % 3]
    trials = [Trial("pgd", 20, 2 / 255), Trial("fgsm", 1, 2 / 255), Trial("pgd", 20, 4 / 255)]
    arrays = {"labels": np.arange(30) % 3, f"clean/{LOGITS}": logits, f"noisy/{LOGITS}": logits}
    arrays |= {f"{trial.key}/{LOGITS}": wrong for trial in trials}

    found = training_of(arrays, arrays, trials, head=None, seed=0)

    assert [len(features.logits) for features in found.attacked] == [60, 30]
