"""Portions of a split: whole patients, nested, and of the requested size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.shards.groups import Groups
from medspark.shards.portion import portion

patients = st.lists(st.integers(0, 30), min_size=1, max_size=200).map(
    lambda numbers: np.array([f"patient-{n}" for n in numbers])
)
shares = st.floats(0.01, 1.0)


@given(keys=patients, share=shares, seed=st.integers(0, 5))
def test_a_patient_is_in_a_part_with_all_images_or_with_none(
    keys: np.ndarray, share: float, seed: int
) -> None:
    rows = portion(Groups.of(keys), share, seed=seed)

    inside = set(keys[rows])
    assert not inside & set(np.delete(keys, rows))
    assert (np.diff(rows) > 0).all()


@given(keys=patients, one=shares, other=shares, seed=st.integers(0, 5))
def test_a_smaller_part_lies_in_a_larger_one(
    keys: np.ndarray, one: float, other: float, seed: int
) -> None:
    small, large = sorted((one, other))

    assert set(portion(Groups.of(keys), small, seed=seed)) <= set(
        portion(Groups.of(keys), large, seed=seed)
    )


@given(keys=patients, share=shares)
def test_a_part_is_as_large_as_asked_and_no_larger_than_its_last_patient(
    keys: np.ndarray, share: float
) -> None:
    rows = portion(Groups.of(keys), share, seed=0)

    most = max(np.unique(keys, return_counts=True)[1])
    assert share * len(keys) <= len(rows) < share * len(keys) + most or share == 1


def test_the_order_of_the_images_does_not_decide_who_is_in_a_part() -> None:
    keys = np.array([f"p{n}" for n in range(50)])

    forwards = set(keys[portion(Groups.of(keys), 0.3, seed=1)])

    assert forwards == set(keys[::-1][portion(Groups.of(keys[::-1]), 0.3, seed=1)])
    assert forwards != set(keys[portion(Groups.of(keys), 0.3, seed=2)])
    assert len(forwards) == pytest.approx(15, abs=1)


def test_a_part_holds_whom_it_held_in_the_version_before() -> None:
    keys = np.array([f"p{n}" for n in range(10)])

    assert portion(Groups.of(keys), 0.4, seed=1).tolist() == [0, 1, 7, 9]


def test_a_whole_split_and_a_part_of_nobody_s() -> None:
    keys = np.array(["a", "a", "b"])

    assert portion(Groups.of(keys), 1.0, seed=0).tolist() == [0, 1, 2]
    assert len(portion(Groups.of(keys), 1e-9, seed=0)) in (1, 2)
