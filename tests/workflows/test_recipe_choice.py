"""A recipe is chosen by its validation figures alone: laws of the choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipe_records import EPS, FLAG, screening

from medspark.study.recipe_report import DEFAULT, RecipeCell, Standing
from medspark.workflows.recipe_choice import best, finalists, standings

RECIPES = (DEFAULT, "a", "b", "c")
share = st.floats(0, 1)
figures = st.tuples(share, share)
scores = st.fixed_dictionaries(dict.fromkeys(RECIPES, figures))


def stand(cells: Sequence[RecipeCell], **changes: Any) -> list[Standing]:
    usual = {"recipes": RECIPES, "sets": ("cxr",), "seeds": (0,), "eps": EPS, "metric": "auroc",
             "margin": 0.01}  # fmt: skip
    return standings(cells, **(usual | changes))


def by_name(found: Sequence[Standing]) -> dict[str, Standing]:
    return {each.recipe: each for each in found}


@given(scores, scores, st.randoms())
def test_test_figures_and_timings_cannot_change_the_choice(told, other, random) -> None:
    cells = [screening(name, *of) for name, of in told.items()]
    tests = [screening(name, *of, stage="test") for name, of in other.items()]
    timed = [screening(name, *of, stage="calibration") for name, of in other.items()]
    everything = [*cells, *tests, *timed]
    random.shuffle(everything)

    assert stand(everything) == stand(cells)
    assert best(stand(everything)) == best(stand(cells))


@given(scores)
def test_the_choice_is_no_worse_than_the_default_and_no_less_accurate_than_the_margin(told) -> None:
    found = stand([screening(name, *of) for name, of in told.items()])

    chosen = best(found)

    assert chosen is not None
    assert told[chosen][0] >= told[DEFAULT][0]
    assert told[chosen][1] >= told[DEFAULT][1] - 0.01
    for worst, clean in told.values():
        if clean >= told[DEFAULT][1] - 0.01:
            assert worst <= told[chosen][0]


@given(scores, st.integers(0, 4))
def test_finalists_are_the_best_that_can_be_chosen_and_not_the_default(told, count) -> None:
    found = stand([screening(name, *of) for name, of in told.items()])

    few, more = finalists(found, count), finalists(found, count + 1)

    assert more[: len(few)] == few
    assert len(few) <= count
    assert DEFAULT not in few
    assert all(by_name(found)[name].eligible for name in few)


def test_at_equal_scores_the_default_stays() -> None:
    cells = [screening("a", 0.5), screening(DEFAULT, 0.5), screening("b", 0.4)]

    assert best(stand(cells)) == DEFAULT


def test_a_flagged_recipe_cannot_be_chosen() -> None:
    cells = [screening(DEFAULT, 0.5), screening("a", 0.9, flags=(FLAG,)), screening("b", 0.6)]

    found = stand(cells)

    assert best(found) == "b"
    assert by_name(found)["a"].reason == "flagged"


def test_a_flagged_default_cannot_be_chosen_either() -> None:
    found = stand([screening(DEFAULT, 0.9, flags=(FLAG,)), screening("a", 0.1)])

    assert best(found) == "a"
    assert finalists(found, 3) == ("a",)


@pytest.mark.parametrize(("clean", "chosen"), [(0.895, "a"), (0.885, DEFAULT)])
def test_a_recipe_that_costs_more_clean_auroc_than_the_margin_on_a_set_is_left_out(
    clean: float, chosen: str
) -> None:
    cells = [
        screening(DEFAULT, 0.5), screening("a", 0.9, 0.99),
        screening(DEFAULT, 0.5, dataset="oct"), screening("a", 0.9, clean, dataset="oct"),
    ]  # fmt: skip

    found = stand(cells, sets=("cxr", "oct"))

    assert best(found) == chosen
    assert ("oct" in by_name(found)["a"].reason) == (chosen == DEFAULT)


def test_a_recipe_that_did_not_finish_everywhere_is_left_out() -> None:
    cells = [
        screening(DEFAULT, 0.5), screening(DEFAULT, 0.5, seed=1),
        screening("a", 0.9), screening("a", 0.9, seed=1, status="failed"),
    ]  # fmt: skip

    assert best(stand(cells)) == "a"
    assert best(stand(cells, seeds=(0, 1))) == DEFAULT


def test_where_the_default_did_not_finish_nothing_can_be_compared_with_it() -> None:
    found = stand([screening("a", 0.9)])

    assert best(found) is None
    assert by_name(found)["a"].reason == "the default has no clean AUROC on cxr"


def test_every_set_counts_the_same_however_many_seeds_it_has() -> None:
    cells = [
        screening(DEFAULT, 0.2), screening(DEFAULT, 0.4, seed=1),
        screening(DEFAULT, 0.7, dataset="oct"),
    ]  # fmt: skip

    (found, *_) = stand(cells, recipes=(DEFAULT,), sets=("cxr", "oct"), seeds=(0, 1))

    assert found.score == pytest.approx(0.5)


def test_the_criterion_decides_which_figure_counts() -> None:
    cells = [screening(DEFAULT, 0.5), screening("a", 0.6)]

    assert best(stand(cells)) == "a"
    assert best(stand(cells, metric="balanced_accuracy")) == DEFAULT
