"""Clients of a linear network that train at once: as alone, and nobody touches another's bits."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import array_shards
import numpy as np
import pretended_rounds
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from medspark.data.config import AugmentConfig
from medspark.data.native import MappedSplit
from medspark.federate import setting, start, training
from medspark.federate.client import Answer, Task, train_client
from medspark.federate.config import FederationConfig
from medspark.federate.guard import Deadline
from medspark.federate.local import LocalConfig
from medspark.federate.server import groups
from medspark.federate.vectorised import Vectorised, bundles, vectorises
from medspark.federate.weights import pack
from medspark.models.classifier import Classifier
from medspark.shards.manifest import read_manifest
from medspark.train.config import AdversarialConfig

SHAPE, CLIENTS, IMAGES = (1, 9, 9), 5, 11
PLAIN = {"train": AdversarialConfig(mode="standard"), "batch_size": 4}


def classifier(*layers: nn.Module) -> Classifier:
    return Classifier(nn.Sequential(*layers), architecture="tiny", mean=[0.4], std=[0.2])


def perceptron(*, outputs: int = 3, bias: bool = True) -> Classifier:
    """Return a network whose layers do not begin at multiples of 64 bytes."""
    torch.manual_seed(0)
    return classifier(
        nn.Flatten(), nn.Linear(81, 7, bias=bias), nn.ReLU(), nn.Linear(7, outputs, bias=bias)
    )


def write(folder: Path, *, findings: bool = False) -> Path:
    draw = np.random.default_rng(0)
    count = CLIENTS * IMAGES
    labels = draw.integers(0, 2, (count, 3)) if findings else np.arange(count) % 3
    pixels = draw.integers(0, 256, (count, *SHAPE[1:], 1), dtype=np.uint8)
    return array_shards.write_arrays(folder, {"train": (pixels, labels), "val": (pixels, labels)})


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("vectorised") / "shards")


def split_of(shards: Path) -> MappedSplit:
    return MappedSplit(shards, read_manifest(shards), "train")


def rows(client: int) -> Any:
    return np.arange(client, CLIENTS * IMAGES, CLIENTS)


# --- as alone ---

LOCAL: dict[str, dict[str, Any]] = {
    "sgd": {"optimiser": "sgd", "lr": 0.1, "schedule": "constant"},
    "momentum": {"optimiser": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "clipped": {"optimiser": "sgd", "lr": 1.0, "clip_grad": 0.05},
    "adamw": {"optimiser": "adamw", "lr": 1e-3, "weight_decay": 0.5},
    "epochs": {"epochs": 3, "epochs_decay": 0.5, "optimiser": "sgd", "lr": 0.1},
}


@pytest.mark.parametrize("local", LOCAL.values(), ids=LOCAL)
def test_clients_that_train_at_once_answer_as_each_alone_but_for_rounding(
    shards: Path, local: dict[str, Any]
):
    assert_as_alone(shards, perceptron(), LocalConfig(**PLAIN | local))


def test_layers_without_bias_and_findings_are_trained_as_alone(tmp_path: Path):
    findings = write(tmp_path / "findings", findings=True)

    assert_as_alone(findings, perceptron(bias=False), LocalConfig(**PLAIN | LOCAL["sgd"]))


def assert_as_alone(shards: Path, model: Classifier, config: LocalConfig) -> None:
    split, turned = split_of(shards), AugmentConfig(flip=0.5, shift=0.2)
    task = Task(pack(model, config.batch_norm), round=1, seed=3, rounds=4)
    alone = [
        train_client(copy.deepcopy(model), split.subset(rows(c)), task, config, augmentation=turned)
        for c in range(CLIENTS)
    ]

    clients = [rows(c) for c in range(CLIENTS)]
    found = Vectorised.of(model, CLIENTS).train(split, clients, task, config, augmentation=turned)

    for one, other in zip(found, alone, strict=True):
        moved = np.abs(other.weights - task.weights).max()
        assert moved > 1e-4
        far = np.abs(one.weights - other.weights) > 1e-3 * moved
        assert far.mean() < 0.01  # AdamW may enlarge the rounding of a gradient near zero
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert (one.images, one.steps) == (other.images, other.steps)
    assert len({each.weights.tobytes() for each in found}) == CLIENTS


def test_a_lane_keeps_its_bits_whatever_the_others_hold(shards: Path):
    model, config = perceptron(), LocalConfig(**PLAIN | LOCAL["clipped"])
    split, task = split_of(shards), Task(pack(model, config.batch_norm))
    lanes = Vectorised.of(model, CLIENTS)

    def train(clients: list[int]) -> list[Answer]:
        return lanes.train(split, [rows(c) for c in clients], task, config)

    everybody, without = train([0, 1, 2, 3, 4]), train([1, 1, 2, 2, 4])

    for client in (1, 2, 4):
        assert everybody[client].weights.tobytes() == without[client].weights.tobytes()


# --- when clients train at once ---


class Random(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images * torch.rand(1) if self.training else images


class Mixed(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images - images.mean(0)


def fixed(model: Classifier) -> Classifier:
    model.backbone[1].requires_grad_(False)
    return model


NETWORKS = {
    "a convolution": lambda: classifier(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(98, 3)),
    "a norm": lambda: classifier(nn.Flatten(), nn.LayerNorm(81), nn.Linear(81, 3)),
    "batch statistics": lambda: classifier(
        nn.Flatten(), nn.BatchNorm1d(81, affine=False), nn.Linear(81, 3)
    ),
    "dropout": lambda: classifier(nn.Flatten(), nn.Dropout(0.5), nn.Linear(81, 3)),
    "random numbers": lambda: classifier(Random(), nn.Flatten(), nn.Linear(81, 3)),
    "mixed images": lambda: classifier(Mixed(), nn.Flatten(), nn.Linear(81, 3)),
    "a layer that is not trained": lambda: fixed(perceptron()),
    "nothing that learns": lambda: classifier(nn.AdaptiveAvgPool2d((3, 1)), nn.Flatten()),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "an attack": {"train": AdversarialConfig(mode="fused")},
    "a penalty": {"train": AdversarialConfig(mode="standard", gradalign=0.1)},
    "a pull": {"prox": 0.1},
    "control variates": {"scaffold": True, "optimiser": "sgd", "batch_norm": "frozen"},
    "private norms": {"batch_norm": "local"},
    "bf16": {"precision": "bf16"},
    "calibration": {"calibrate": "loss"},
    "an adversary": {"adversary": {"name": "sign_flip", "clients": (1,)}},
}


def vectorised(model: Any = perceptron, *, weights: int = 600, **settings: Any) -> bool:
    return vectorises(FederationConfig(**PLAIN | settings), model, SHAPE, weights=weights)


def test_clients_of_linear_networks_that_train_plainly_train_at_once():
    assert vectorised()
    assert vectorised(optimiser="sgd", momentum=0.9, clip_grad=1, aggregate="median")
    assert not vectorised(weights=1 << 20)


@pytest.mark.parametrize("model", NETWORKS.values(), ids=NETWORKS)
def test_clients_of_other_networks_train_one_after_the_other(model: Any):
    assert not vectorised(model)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_clients_that_do_more_than_plain_training_train_one_after_the_other(settings: Any):
    def unused() -> Classifier:
        raise AssertionError("no network is needed to know this")

    assert not vectorised(unused, **settings)


# --- the plan ---


@given(st.lists(st.integers(1, 4), min_size=1, max_size=60), st.data())
def test_bundles_hold_every_client_once_and_depend_on_nothing_else(
    counts: list[int], data: st.DataObject
):
    asked = data.draw(st.permutations(range(len(counts))))

    found = bundles(asked, np.array(counts))

    assert sorted(client for bundle in found for client in bundle) == sorted(asked)
    assert found == bundles(sorted(asked), np.array(counts))
    for bundle in found:
        assert len({counts[client] for client in bundle}) == 1
        assert len(bundle) <= 8
        others = [len(b) for b in found if counts[b[0]] == counts[bundle[0]]]
        assert max(others) - min(others) <= 1


@given(st.lists(st.integers(1, 4), min_size=1, max_size=60), st.integers(1, 8))
def test_a_bundle_is_in_one_group_and_groups_hold_about_as_many_images(
    counts: list[int], parts: int
):
    together = bundles(range(len(counts)), np.array(counts))

    found = groups(range(len(counts)), counts, parts, together)

    assert sorted(client for group in found for client in group) == list(range(len(counts)))
    assert all(any(set(bundle) <= set(group) for group in found) for bundle in together)
    loads = [sum(counts[client] for client in group) for group in found]
    assert max(loads) - min(loads) <= max(sum(counts[c] for c in bundle) for bundle in together)


# --- rounds ---


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let federations have the perceptron."""
    for module in (setting, start):
        monkeypatch.setattr(module, "new_network", lambda config, manifest: perceptron())


def rounds(shards: Path, place: Path, *, parts: int = 1, **settings: Any) -> Any:
    clients = {"by": "patient", "count": CLIENTS}
    chosen = {"clients": clients, "batch_size": 4, "lr": 0.1} | settings
    return pretended_rounds.Rounds(
        shards, place, parts=parts, train=train_client, mode="standard", **chosen
    )


def all_trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return a list of the rows that each call trains; it grows as they come."""
    seen: list[tuple[int, ...]] = []
    train = Vectorised.train

    def noted(self: Any, split: Any, rows: Any, *given: Any, **more: Any) -> Any:
        seen.append(tuple(int(each[0]) for each in rows))
        return train(self, split, rows, *given, **more)

    monkeypatch.setattr(Vectorised, "train", noted)
    return seen


@pytest.mark.parametrize("aggregate", ["fedavg", "median"])
def test_rounds_in_which_clients_train_at_once_have_the_same_bits_in_any_number_of_tasks(
    shards: Path, tmp_path: Path, linear: None, aggregate: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("medspark.federate.vectorised._LANES", 2)
    seen = all_trained(monkeypatch)
    one, three = (
        rounds(shards, tmp_path / str(parts), parts=parts, rounds=3, aggregate=aggregate)
        for parts in (1, 3)
    )

    one.run(3)
    three.run(3)

    assert one.weights.tobytes() == three.weights.tobytes()
    assert len(seen) == 2 * 3 * 2  # of two bundles; the fifth client is alone
    assert {len(each) for each in seen} == {2}


def test_a_round_of_clients_that_train_at_once_is_that_of_clients_alone_but_for_rounding(
    shards: Path, tmp_path: Path, linear: None, monkeypatch: pytest.MonkeyPatch
):
    seen = all_trained(monkeypatch)
    at_once = rounds(shards, tmp_path / "at_once")
    at_once.run()
    monkeypatch.setattr("medspark.federate.server.vectorises", lambda *_, **__: False)

    alone = rounds(shards, tmp_path / "alone")
    alone.run()

    moved = np.abs(alone.weights - pack(perceptron(), "frozen")).max()
    assert moved > 1e-3
    assert np.abs(at_once.weights - alone.weights).max() < 1e-3 * moved
    assert len(seen) == 1


def round_without(client: int, shards: Path, place: Path) -> Any:
    """Return a federation after a round in which ``client`` was left out from the start."""
    without = rounds(shards, place / "without")
    without.folder.leave_out(0, client, "x")
    without.run()
    return without


def test_an_answer_that_is_no_number_leaves_the_others_of_its_bundle_alone(
    shards: Path, tmp_path: Path, linear: None, monkeypatch: pytest.MonkeyPatch
):
    without = round_without(1, shards, tmp_path)
    train = Vectorised.train

    def spoilt(self: Any, *given: Any, **more: Any) -> Any:
        answers = train(self, *given, **more)
        answers[1].weights[0] = np.nan
        return answers

    monkeypatch.setattr(Vectorised, "train", spoilt)
    found = rounds(shards, tmp_path / "found")
    (record,) = found.run()

    assert record.left_out == {1: "the update holds numbers that are not finite"}
    assert found.weights.tobytes() == without.weights.tobytes()


def test_a_bundle_that_raises_is_trained_client_by_client_and_only_who_fails_is_left_out(
    shards: Path, tmp_path: Path, linear: None, monkeypatch: pytest.MonkeyPatch
):
    without = round_without(3, shards, tmp_path)
    first = int(without.clients[3][0])
    train = Vectorised.train

    def failing(self: Any, split: Any, rows: Any, *given: Any, **more: Any) -> Any:
        if first in {int(each[0]) for each in rows}:
            raise MemoryError("no room")
        return train(self, split, rows, *given, **more)

    monkeypatch.setattr(Vectorised, "train", failing)
    found = rounds(shards, tmp_path / "found")
    (record,) = found.run()

    assert record.left_out == {3: "MemoryError: no room"}
    assert found.weights.tobytes() == without.weights.tobytes()


def test_clients_whose_task_died_train_alone_so_that_it_is_seen_who_ends_it(
    shards: Path, tmp_path: Path, linear: None, monkeypatch: pytest.MonkeyPatch
):
    whole = rounds(shards, tmp_path / "whole")
    whole.run()
    seen = all_trained(monkeypatch)
    found = rounds(shards, tmp_path / "found")
    step = begun(found)
    progress = found.folder.round(0) / "progress-00000.txt"
    progress.write_text("".join(f"+{client}\n" for client in range(CLIENTS)))

    answer = found.executor.do(step, 1)

    assert sorted(map(int, answer[0]["clients"])) == list(range(CLIENTS))
    assert sorted(seen) == sorted((int(found.clients[c][0]),) * CLIENTS for c in range(CLIENTS))
    deaths = [progress.read_text().count(f"+{client}\n") for client in range(CLIENTS)]
    assert deaths == CLIENTS * [2]


def begun(found: Any) -> Any:
    """Return the training step of the first round, as the server asks for it."""
    fails = pretended_rounds.Fails()
    found.server._executor, asked = fails, found.server._executor
    with pytest.raises(KeyboardInterrupt):
        found.server.run(0)
    found.server._executor = asked
    return fails.step


def test_clients_of_a_bundle_that_takes_too_long_are_not_left_out(
    shards: Path, tmp_path: Path, linear: None, monkeypatch: pytest.MonkeyPatch
):
    ended: list[int] = []
    monkeypatch.setattr("medspark.federate.guard.os._exit", lambda status: 1 / 0)
    monkeypatch.setattr("threading.excepthook", lambda error: ended.append(1))
    found = rounds(shards, tmp_path)
    found.folder.round(0).mkdir(exist_ok=True)

    for clients in ([0, 1], [2]):
        with Deadline(found.folder, 0.05).of(0, clients):
            for _ in range(500):
                if len(ended) == 1 + clients[0] // 2:
                    break
                time.sleep(0.01)

    assert list(found.folder.left_out(0)) == [2]


def test_the_held_answers_are_added_up_before_they_take_too_much_memory(
    shards: Path, tmp_path: Path, linear: None, monkeypatch: pytest.MonkeyPatch
):
    whole = rounds(shards, tmp_path / "whole")
    whole.run()
    monkeypatch.setattr(training, "_HELD_BYTES", 1)
    found = rounds(shards, tmp_path / "found")

    found.run()

    assert found.weights.tobytes() == whole.weights.tobytes()
