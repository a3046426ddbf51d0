"""The cohort of a round: how many clients, and that no client's place depends on the others."""

from __future__ import annotations

import numpy as np
import pytest
from draws import seeds
from hypothesis import given
from hypothesis import strategies as st

from medspark.federate.round import cohort


@given(seeds, st.integers(1, 30), st.integers(1, 40))
def test_a_cohort_is_as_large_as_asked_and_nobody_is_in_it_twice(seed: int, per: int, total: int):
    found = cohort(range(total), per, seed=seed, round=3)

    assert len(found) == len(set(found)) == min(per, total)
    assert set(found) <= set(range(total))


@given(seeds)
def test_who_else_there_is_changes_nobodys_place(seed: int):
    everybody = cohort(range(40), 10, seed=seed, round=0)

    few = cohort(range(0, 40, 2), len([c for c in everybody if c % 2 == 0]), seed=seed, round=0)

    assert few == [c for c in everybody if c % 2 == 0]


def test_over_many_rounds_every_client_is_asked_as_often():
    asked = np.bincount(
        np.concatenate([cohort(range(20), 5, seed=1, round=r) for r in range(2000)])
    )

    assert asked == pytest.approx(500, abs=80)
