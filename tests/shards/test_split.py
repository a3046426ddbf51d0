"""A patient's split depends on the patient, not on the other patients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.config import load_config
from medspark.errors import UsageError
from medspark.shards.split import SplitConfig, patient_split, together

PATIENTS = st.dictionaries(
    st.text(min_size=1, max_size=8), st.sets(st.sampled_from(["train", "test"])), max_size=40
)
SHARES = st.tuples(st.floats(0, 0.45), st.floats(0, 0.45))


def assign(
    patients: Mapping[str, Collection[str]], config: SplitConfig, *, seed: int
) -> dict[str, str]:
    """Return the split of every patient, given the hints of each."""
    own = {split for hints in patients.values() for split in hints}
    return {
        patient: patient_split(patient, hints, config, seed=seed, own=own)
        for patient, hints in patients.items()
    }


@given(PATIENTS, PATIENTS, SHARES, st.integers(0, 5))
def test_adding_files_never_moves_a_patient(old, new, shares, seed):
    config = SplitConfig(val=shares[0], test=shares[1])
    own = {split for hints in [*old.values(), *new.values()] for split in hints}

    before = {p: patient_split(p, h, config, seed=seed, own=own) for p, h in old.items()}
    after = assign({**new, **old}, config, seed=seed)

    assert {patient: after[patient] for patient in old} == before


@given(PATIENTS, SHARES)
def test_without_hints_nothing_but_the_patient_matters(patients, shares):
    config = SplitConfig(val=shares[0], test=shares[1], use_hints=False)

    together = assign(patients, config, seed=0)

    alone = {patient: assign({patient: ()}, config, seed=0)[patient] for patient in patients}
    assert together == alone


@given(PATIENTS)
def test_a_patient_of_the_test_set_is_tested_whatever_else_the_hints_say(patients):
    splits = assign(patients, SplitConfig(), seed=0)

    assert all(splits[p] == "test" for p, hints in patients.items() if "test" in hints)
    if any("test" in hints for hints in patients.values()):
        assert all(splits[p] != "test" for p, hints in patients.items() if hints == {"train"})


HINTS = st.sets(st.sampled_from(["train", "val", "test"]), min_size=1)


@given(HINTS, HINTS, st.text(max_size=8), st.integers(0, 5))
def test_of_several_hints_for_one_patient_the_most_held_out_one_counts(hints, own, patient, seed):
    split = patient_split(patient, hints, SplitConfig(), seed=seed, own=own | hints)

    held_out = [name for name in ("test", "val") if name in hints]
    assert split == held_out[0] if held_out else split == "train" or split not in own


@pytest.mark.parametrize("own", [(), ("test",), ("train", "val", "test")])
def test_patients_without_a_hint_get_the_shares_beside_those_with_one(own):
    config = SplitConfig(val=0.1, test=0.2)

    dealt = Counter(patient_split(f"p{i}", (), config, seed=1, own=own) for i in range(10_000))

    assert dealt["test"] / 10_000 == pytest.approx(0.2, abs=0.015)
    assert dealt["val"] / 10_000 == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize("own", [("train",), ("train", "val"), ("train", "test")])
def test_training_patients_are_held_out_only_for_a_split_that_the_data_do_not_have(own):
    dealt = {patient_split(f"p{i}", ("train",), SplitConfig(), seed=1, own=own) for i in range(500)}

    assert dealt == {"train", *({"val", "test"} - set(own))}


def test_a_split_that_one_patient_s_images_came_with_is_one_that_the_data_have():
    hints = {"p": {"train", "val", "test"}} | {f"p{i}": {"train"} for i in range(100)}

    assert set(assign(hints, SplitConfig(), seed=0).values()) == {"test", "train"}


def test_folds_deal_what_came_as_train_or_val_and_leave_what_came_as_test():
    hints = {f"v{i}": {"val"} for i in range(60)} | {f"t{i}": {"test"} for i in range(20)}
    hints |= {f"w{i}": {"train"} for i in range(60)}
    hints |= {f"b{i}": {"train", "test"} for i in range(20)}

    folds = [assign(hints, SplitConfig(folds=3, fold=k), seed=0) for k in range(3)]

    for patient in hints:
        seen = [fold[patient] for fold in folds]
        assert sorted(seen) == (["test"] * 3 if patient[0] in "tb" else ["train", "train", "val"])


def test_the_data_of_a_version_are_dealt_as_by_the_one_before():
    dealt = [
        patient_split(f"p{i}", (), SplitConfig(val=0.3, test=0.3), seed=7, own=())
        for i in range(12)
    ]

    assert "".join(split[1] for split in dealt) == "eerarraaerre"


def test_every_class_at_every_site_has_its_shares_within_a_percent_at_scale():
    splits = assign({f"p{i}": () for i in range(100_000)}, SplitConfig(val=0.1, test=0.2), seed=0)

    # Two classes at three sites: the hash is independent of both.
    strata = Counter((i % 2, i // 2 % 3) for i in range(100_000))
    dealt = Counter((splits[f"p{i}"], i % 2, i // 2 % 3) for i in range(100_000))

    for stratum, patients in strata.items():
        for split, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
            assert dealt[split, *stratum] / patients == pytest.approx(share, abs=0.01)
    totals = Counter(splits.values())
    assert totals["test"] / 100_000 == pytest.approx(0.2, abs=0.004)
    assert totals["val"] / 100_000 == pytest.approx(0.1, abs=0.004)


@pytest.mark.parametrize("own", [(), ("train", "test")])
def test_shares_are_met_within_a_percent(own):
    config = SplitConfig(val=0.1, test=0.2)

    dealt = [
        patient_split(f"p{i}", own[:1], config, seed=3, own=own).count("val") for i in range(20_000)
    ]

    # If the data have a test set, val is its share of the other patients.
    assert sum(dealt) / len(dealt) == pytest.approx(0.125 if own else 0.1, abs=0.01)


def test_val_is_carved_out_of_train_only_where_the_data_have_none():
    hinted = {f"p{i}": {"train"} for i in range(200)} | {"t": {"test"}}

    carved = assign(hinted, SplitConfig(), seed=0)
    given_val = assign(hinted | {"v": {"val"}}, SplitConfig(), seed=0)

    assert set(carved.values()) == {"train", "val", "test"}
    assert [p for p, split in given_val.items() if split == "val"] == ["v"]


def test_folds_cover_everybody_who_is_not_tested_once():
    patients: dict[str, tuple[str, ...]] = {f"p{i}": () for i in range(300)}

    folds = [assign(patients, SplitConfig(folds=5, fold=k), seed=0) for k in range(5)]

    for patient in patients:
        seen = [fold[patient] for fold in folds]
        assert seen == ["test"] * 5 or (seen.count("val") == 1 and seen.count("train") == 4)


def test_another_seed_deals_otherwise():
    patients: dict[str, tuple[str, ...]] = {f"p{i}": () for i in range(100)}

    assert assign(patients, SplitConfig(), seed=0) != assign(patients, SplitConfig(), seed=1)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--val", "0.6", "--test", "0.5"], "leave nothing to train on"),
        (["--val", "0.5", "--test", "0.5"], "leave nothing to train on"),
        (["--folds", "1"], "greater than or equal to 2"),
        (["--fold", "-1"], "greater than or equal to 0"),
        (["--folds", "3", "--fold", "3"], "below 3"),
    ],
)
def test_shares_that_cannot_be_are_refused(argv, said):
    with pytest.raises(UsageError, match=said):
        load_config(SplitConfig, argv)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40))
def test_what_pairs_connect_is_together_under_its_smallest_member(pairs):
    found = together(pairs)

    groups = [{member} for member in {m for pair in pairs for m in pair}]
    for pair in pairs:
        touched = [group for group in groups if group & set(pair)]
        groups = [group for group in groups if group not in touched] + [set.union(*touched)]
    assert found == {member: min(group) for group in groups for member in group}
