"""Rows of shards by patient and by site: the groups of the columns themselves."""

from __future__ import annotations

from pathlib import Path

import array_shards
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.shards.groups import Groups, read_groups
from medspark.shards.schema import read_patients, read_sites


@given(st.lists(st.sampled_from(["", "a", "b", "ba"])))
def test_every_row_is_in_the_group_of_its_key(values: list[str]):
    found = Groups.of(values)

    assert found.keys.take(found.codes).to_pylist() == values
    assert found.keys.to_pylist() == sorted(set(values))


@pytest.mark.parametrize("shards", [1, 3])
def test_rows_of_several_shards_are_grouped_together(tmp_path: Path, shards: int):
    sites = ["west", None, "east", "west", None, "north", "east"]
    images = np.zeros((7, 2, 2, 1), dtype=np.uint8), np.arange(7) % 2
    folder = array_shards.write_arrays(
        tmp_path / "s", {"train": images}, shards=shards, sites={"train": sites}
    )
    paths = sorted((folder / "data").iterdir())

    by_site, by_patient = read_groups(paths, "site"), read_groups(paths, "patient_key")

    assert by_site.keys.to_pylist() == ["", "east", "north", "west"]
    assert "" not in by_patient.keys.to_pylist()
    for found, read in ((by_site, read_sites), (by_patient, read_patients)):
        column = np.concatenate([read(path) for path in paths])
        assert found.keys.take(found.codes).to_pylist() == column.tolist()


def test_no_shard_has_no_groups():
    found = read_groups([], "site")

    assert (len(found.keys), len(found.codes)) == (0, 0)


@given(*[st.lists(st.sampled_from(["", "a", "b", "ba"]))] * 2)
def test_a_row_is_placed_among_the_known_keys(values: list[str], known: list[str]):
    keys = sorted(set(known))

    places = Groups.of(values).places_in(Groups.of(known))

    assert places.tolist() == [keys.index(v) if v in keys else -1 for v in values]
