"""From images to figures: the worst case, what success means, and what is flagged."""

import numpy as np

from medspark.evaluate.sanity import SanityConfig
from medspark.evaluate.summary import (
    Arrays,
    Detail,
    Trial,
    flags,
    joined,
    summarise,
    worst_cases,
)

LABELS = np.array([0, 0, 1, 1])
A1, A2, B1 = Trial("pgd", 20, 1 / 255), Trial("pgd", 20, 2 / 255), Trial("square", 100, 1 / 255)


def sure_of(ill: list[float]) -> np.ndarray:
    return np.stack([1 - np.array(ill), np.array(ill)], axis=1)


ARRAYS: Arrays = {
    "rows": np.arange(4),
    "labels": LABELS,
    "clean": sure_of([0.1, 0.6, 0.9, 0.8]),
    A1.key: sure_of([0.2, 0.7, 0.3, 0.8]),
    B1.key: sure_of([0.1, 0.6, 0.9, 0.4]),
    A2.key: sure_of([0.9, 0.9, 0.6, 0.6]),
}
TRIALS = [A1, A2, B1]


def right(probabilities: np.ndarray) -> list[bool]:
    return (probabilities.argmax(1) == LABELS).tolist()


def test_the_worst_case_is_wrong_where_any_attack_at_that_eps_or_below_is() -> None:
    (first, at_one), (second, at_two) = worst_cases(ARRAYS, TRIALS)

    assert (first.eps, second.eps) == (1 / 255, 2 / 255)
    assert right(at_one) == [True, False, False, False]
    assert right(at_two) == [False, False, False, False]


def test_the_report_counts_success_on_what_was_right() -> None:
    report = summarise(ARRAYS, TRIALS, limits=SanityConfig())

    assert report.clean.accuracy == 3 / 4
    assert [attack.success_rate for attack in report.attacks] == [1 / 3, 1 / 3, 1 / 3]
    assert [attack.metrics.accuracy for attack in report.worst] == [1 / 4, 0]
    assert report.worst[0].success_rate == 2 / 3


def test_detail_adds_intervals_and_classes() -> None:
    detail = Detail(groups=np.array(["a", "a", "b", "b"]), samples=50, classes=("well", "ill"))

    report = summarise(ARRAYS, TRIALS, limits=SanityConfig(), detail=detail)

    document = report.as_json()
    assert document["clean"]["classes"][1]["name"] == "ill"
    low, high = document["attacks"][0]["intervals"]["accuracy"]
    assert low <= document["attacks"][0]["accuracy"] <= high
    assert "success_rate" in document["attacks"][0]["intervals"]
    assert set(document["attacks"][0]["classes"][1]["intervals"]) <= {
        "sensitivity", "specificity", "auroc",
    }  # fmt: skip


def test_parts_are_joined_in_the_order_of_the_rows_each_image_once() -> None:
    parts = [
        {name: values[chosen] for name, values in ARRAYS.items()} for chosen in ([2, 3], [0, 1, 2])
    ]

    whole = joined(parts)

    for name, values in ARRAYS.items():
        np.testing.assert_array_equal(whole[name], values)


def triggered(arrays: Arrays, trials: list[Trial]) -> set[str]:
    return {flag.name for flag in flags(arrays, trials, SanityConfig()) if flag.triggered}


def test_a_black_box_that_does_more_harm_than_gradients_is_flagged() -> None:
    white, black = Trial("pgd", 20, 0.1), Trial("transfer", 20, 0.1)
    arrays = {**ARRAYS, white.key: ARRAYS["clean"], black.key: ARRAYS[A2.key]}

    assert triggered(arrays, [white, black]) == {"transfer_beats_white_box"}
    assert triggered({**arrays, white.key: ARRAYS[A2.key]}, [white, black]) == set()


def test_an_attack_that_does_less_harm_with_more_eps_is_flagged() -> None:
    arrays = {**ARRAYS, A2.key: ARRAYS["clean"]}

    assert triggered(arrays, [A1, A2]) == {"pgd_not_falling_with_eps"}


def test_images_outside_the_threat_model_are_flagged() -> None:
    arrays = {**ARRAYS, f"{A1.key}/outside": np.array([False, True, False, False])}

    assert triggered(arrays, [A1]) == {"attack_leaves_threat_model"}


def test_a_network_that_is_dead_for_many_images_is_flagged() -> None:
    arrays = {**ARRAYS, "clean": sure_of([0.7, 0.7, 0.7, 0.8])}

    assert "same_answer_for_many" in triggered(arrays, [])
    assert triggered(ARRAYS, []) == set()


def test_a_network_that_says_the_same_of_all_is_flagged_where_the_truth_differs() -> None:
    arrays = {**ARRAYS, "clean": sure_of([0.7, 0.6, 0.9, 0.8])}

    assert "same_class_for_all" in triggered(arrays, [])
    assert triggered({**arrays, "labels": np.ones(4, dtype=int)}, []) == set()
