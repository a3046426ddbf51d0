"""The recipes of the table: who learns how, from whom, and what makes a network another one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from array_shards import write_arrays
from hypothesis import given
from hypothesis import strategies as st

from medspark.shards.manifest import read_manifest
from medspark.shards.schema import SPLITS
from medspark.workflows.paper_plan import (
    Dataset,
    Network,
    PaperTableConfig,
    distillation,
    fingerprint,
    networks,
    recipe,
    surrogates,
)

TRAININGS = ("original", "adversarial", "distillation", "robust_distillation")


def table(**changes: object) -> PaperTableConfig:
    return PaperTableConfig.model_validate({"models": ["a", "b"], "trainings": TRAININGS} | changes)


@pytest.fixture
def dataset(cxr: Dataset) -> Dataset:
    return cxr


@pytest.fixture(scope="module")
def cxr(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    images, labels = np.zeros((4, 6, 6, 1), dtype=np.uint8), np.arange(4) % 2
    splits = dict.fromkeys(SPLITS, (images, labels))
    folder = write_arrays(tmp_path_factory.mktemp("cxr"), splits, shards=1, rows_per_group=8)
    return Dataset("cxr", folder, read_manifest(folder))


@pytest.fixture
def by_training(dataset: Dataset) -> dict[str, Network]:
    found = networks(table(models=["a"]), [dataset])
    return {network.training: network for network in found}


def test_there_is_one_network_for_each_cell_in_the_order_of_the_table(dataset: Dataset):
    found = list(networks(table(seeds=[0, 1]), [dataset]))

    assert len(found) == 2 * 4 * 2
    assert [(n.model, n.training, n.seed) for n in found[:3]] == [
        ("a", "original", 0), ("a", "original", 1), ("a", "adversarial", 0),
    ]  # fmt: skip


def test_only_the_adversarial_network_learns_from_attacks_of_its_own(by_training):
    config = table(train={"mode": "trades", "dual_bn": True})

    modes = {name: recipe(config, network).train.mode for name, network in by_training.items()}

    assert modes.pop("adversarial") == "trades"
    assert set(modes.values()) == {"standard"}
    assert not recipe(config, by_training["original"]).train.dual_bn


@pytest.mark.parametrize("training", ["pgd", "trades"])
def test_a_training_that_is_a_mode_has_it_whatever_the_adversarial_one_is(
    dataset: Dataset, training: str
):
    config = table(models=["a"], trainings=[training], train={"mode": "fused", "awp": 0.01})
    (network,) = networks(config, [dataset])

    train = recipe(config, network).train

    assert (train.mode, train.awp) == (training, 0.01)


def test_the_defensive_teacher_learns_at_the_temperature_it_teaches_at(by_training):
    config, student = table(temperature=20.0), by_training["distillation"]

    assert recipe(config, student.teacher).train.temperature == 20
    assert recipe(config, student).train.temperature == 1
    assert distillation(config, student, Path("t")).temperature == 20
    assert distillation(config, student, Path("t")).method == "defensive"


def test_the_robust_students_teacher_is_the_adversarial_network_of_the_table(by_training):
    assert by_training["robust_distillation"].teacher == by_training["adversarial"]


def test_every_network_has_a_fingerprint_of_its_own(dataset: Dataset):
    config = table(seeds=[0, 1])
    found = list(networks(config, [dataset]))

    assert len({fingerprint(config, network) for network in found}) == len(found)


def test_transfer_comes_from_the_originals_of_the_other_models(dataset: Dataset):
    transfer = table(models=["a", "b", "c"], seeds=[0, 1], evaluate={"attacks": ["transfer"]})
    plain = table(models=["a", "b", "c"], seeds=[0, 1])
    by_name = {str(network): network for network in networks(transfer, [dataset])}

    found = surrogates(transfer, by_name["b, distillation, on cxr, seed 1"])

    originals = ("a, original, on cxr, seed 1", "c, original, on cxr, seed 1")
    assert found == tuple(by_name[name] for name in originals)
    assert surrogates(plain, by_name["b, distillation, on cxr, seed 1"]) == ()


@pytest.mark.parametrize(
    ("changes", "training", "same"),
    [
        ({"evaluate": {"steps": 99}}, "original", True),
        ({"folder": "elsewhere", "launch": {"processes": 1}}, "original", True),
        ({"train": {"epochs": 9}}, "original", False),
        ({"train": {"mode": "pgd"}}, "original", True),
        ({"train": {"mode": "pgd"}}, "adversarial", False),
        ({"train": {"mode": "pgd"}}, "robust_distillation", False),
        ({"temperature": 10}, "adversarial", True),
        ({"temperature": 10}, "distillation", False),
        ({"temperature": 10}, "robust_distillation", True),
        ({"robust_method": "ard"}, "robust_distillation", False),
        ({"robust_method": "ard"}, "distillation", True),
        ({"attack": {"eps": "4/255"}}, "adversarial", False),
        ({"data": {"augment": {"flip": 0.1}}}, "original", False),
        ({"data": {"window": 99}}, "original", False),
        ({"data": {"prefetch": 9}}, "original", True),
        ({"track": {"experiment": "x"}}, "original", True),
    ],
)
def test_a_fingerprint_changes_with_what_decides_the_weights(by_training, changes, training, same):
    network = by_training[training]

    told = {fingerprint(config, network) for config in (table(), table(**changes))}

    assert (len(told) == 1) == same


@given(
    shares=st.lists(st.floats(0.01, 1), min_size=2, max_size=2, unique=True),
    training=st.sampled_from(TRAININGS),
)
def test_a_network_of_another_share_of_the_data_is_another_one(
    shares: list[float], training: str, cxr: Dataset
) -> None:
    config = table(models=["a"], trainings=[training])
    found = [next(networks(config, [replace(cxr, share=share)])) for share in shares]

    assert len({fingerprint(config, network) for network in found}) == 2
    assert [recipe(config, network).data.share for network in found] == shares


def test_a_network_of_other_images_or_first_weights_is_another_one(
    by_training: dict[str, Network], tmp_path: Path
) -> None:
    network, one, two = by_training["original"], tmp_path / "1", tmp_path / "2"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    other = network.dataset.manifest.model_copy(update={"digest": "another"})
    configs = [table(), table(weights={"a": str(one)}), table(weights={"a": str(two)})]

    told = {fingerprint(config, network) for config in configs}
    told.add(
        fingerprint(table(), replace(network, dataset=replace(network.dataset, manifest=other)))
    )

    assert len(told) == 4
    two.write_bytes(b"1")  # the same weights at another place
    assert fingerprint(configs[1], network) == fingerprint(configs[2], network)


def test_a_recipe_takes_seed_share_and_weights_of_its_network(cxr: Dataset) -> None:
    config = table(weights={"b": "pretrained"}, seeds=[3], train={"epochs": 9})
    (network,) = [
        n for n in networks(config, [replace(cxr, share=0.5)]) if str(n).startswith("b, original")
    ]

    chosen = recipe(config, network)

    assert (chosen.seed, chosen.data.share, chosen.train.epochs) == (3, 0.5, 9)
    assert (chosen.model.name, chosen.model.weights) == ("b", "pretrained")
    assert chosen.resume == "auto"
    assert network.dataset.train_images == round(0.5 * cxr.manifest.splits["train"].rows)


@pytest.mark.parametrize(
    ("training", "name"),
    [
        ("original", "689725fa6021386b"),
        ("adversarial", "f95ca10444e9b1d1"),
        ("distillation", "66149da2a9c571c6"),
        ("robust_distillation", "f5480313a9a2655f"),
    ],
)
def test_networks_of_earlier_versions_are_found_again(cxr: Dataset, training: str, name: str):
    known = cxr.manifest.model_copy(update={"digest": "d"})
    config = table(models=["a"], trainings=[training])
    (network,) = networks(config, [replace(cxr, manifest=known, share=0.5)])

    assert fingerprint(config, network) == name
