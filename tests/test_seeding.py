"""Keyed randomness: the same everywhere, different for every purpose, evenly spread."""

from __future__ import annotations

import numpy as np

from medspark.seeding import derive, uniform


def test_a_key_is_the_same_on_every_machine_and_differs_by_purpose():
    assert derive(1, "flip", 2) == 0x9FBDF404953B00DF
    assert (
        len({derive(s, n, i) for s in range(9) for n in ("flip", "noise") for i in range(9)}) == 162
    )


def test_a_number_depends_on_its_index_alone():
    whole = uniform(7, np.arange(100))

    assert np.array_equal(uniform(7, np.arange(50, 60)), whole[50:60])
    assert not np.array_equal(uniform(8, np.arange(100)), whole)


def test_numbers_spread_evenly_over_the_unit_interval():
    counts, _ = np.histogram(uniform(3, np.arange(100_000)), bins=10, range=(0, 1))

    assert abs(counts - 10_000).max() < 500
