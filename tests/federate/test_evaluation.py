"""Tests of clients: their own networks under the policy local, and whose images they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import array_shards
import numpy as np
import pytest
import torch

from medspark.data.native import MappedSplit
from medspark.evaluate.config import AttackSettings
from medspark.federate.client import Memory
from medspark.federate.config import FederationConfig
from medspark.federate.folder import FederationFolder
from medspark.federate.network import client_norms, new_network, save_network
from medspark.federate.server import InProcess, Server
from medspark.federate.setting import Setting
from medspark.federate.start import begin, owners_of
from medspark.federate.stored import ClientRows, write_memory
from medspark.federate.weights import pack_kept, unpack_kept
from medspark.models.checkpoint import load_classifier
from medspark.shards.manifest import read_manifest

ATTACKS = AttackSettings(attacks=("fgsm",), eps=(2 / 255,), sanity_images=4)
TESTED = {0: np.array([0, 3]), 2: np.array([1, 4, 5]), 3: np.array([2])}


def write(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    parts = {"train": 24, "test": 12}
    splits = {
        name: (draw.integers(0, 256, (n, 16, 16, 1)).astype(np.uint8), np.arange(n) % 2)
        for name, n in parts.items()
    }
    return array_shards.write_arrays(folder, splits)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    """A federation after a round in which clients 0 and 2 kept batch norms, and 3 did not train."""
    shards = write(tmp_path / "shards")
    config = FederationConfig.model_validate(
        {"model": {"name": "test_resnet"}, "batch_norm": "local", "clients": {"count": 4}}
    )
    folder, manifest = FederationFolder(tmp_path / "run"), read_manifest(shards)
    begin(folder, config, shards, manifest)
    model = new_network(config, manifest)
    usual = pack_kept(model, "local")
    for client in (0, 2):
        norms = usual + np.float32(0.1 * (client + 1))
        write_memory(folder.memory(client, 0), Memory(norms=norms))
    mean = client_norms(folder, {0: 0, 2: 0})
    assert mean == pytest.approx(usual + 0.2, abs=1e-6)
    weights = folder.read(-1, "weights")
    save_network(folder.path / "model", model, weights, config, manifest, norms=mean)
    setting = Setting(config, shards, folder)
    found = Server(setting, InProcess(setting, parts=2), ClientRows(folder.path / "clients.npz"))
    found._memory = {0: 0, 2: 0}
    return found


def answers_with(server: Server, client: int | None, rows: Any) -> Any:
    """Return the probabilities (N, 2) with the batch norms of a client; of all for None."""
    folder, shards = server._folder, server._setting.shards
    network = load_classifier(folder.path / "model")
    if client is not None:
        with np.load(folder.memory(client, 0)) as kept:
            unpack_kept(network, kept["norms"], "local")
    images, _ = MappedSplit(shards, read_manifest(shards), "test").tensors(rows)
    with torch.no_grad():
        return network(images).softmax(1).numpy()


def test_every_client_is_tested_with_its_own_batch_norms(server: Server, tmp_path: Path):
    arrays = server.evaluate_own(
        tmp_path / "run" / "model", ATTACKS, TESTED, split="test", total=12, work=tmp_path / "w"
    )

    assert arrays["rows"].tolist() == [0, 1, 2, 3, 4, 5]
    for client, rows in TESTED.items():
        expected = answers_with(server, client if client < 3 else None, rows)
        assert np.allclose(arrays["clean"][rows], expected, atol=1e-5)
    assert not np.allclose(arrays["clean"][:2], answers_with(server, None, np.array([0, 1])))


def test_the_test_of_clients_has_the_arrays_of_the_whole_test(server: Server, tmp_path: Path):
    model = tmp_path / "run" / "model"
    own = server.evaluate_own(model, ATTACKS, TESTED, split="test", total=12, work=tmp_path / "own")
    whole = server.evaluate(model, ATTACKS, split="test", total=12, work=tmp_path / "whole")

    assert own.keys() == whole.keys()
    probed = [np.isfinite(arrays["unsteady"][:6]).tolist() for arrays in (own, whole)]
    assert probed[0] == probed[1]


@pytest.mark.parametrize("count", [None, 5])
def test_by_patient_test_patients_are_groups_in_which_nobody_trained(
    tmp_path: Path, count: int | None
):
    shards = write(tmp_path / "shards")
    config = FederationConfig.model_validate({"clients": {"count": count}})

    owners, names = owners_of(config, shards, read_manifest(shards), "test")

    assert names == []
    assert np.bincount(owners).tolist() == ([1] * 12 if count is None else [3, 3, 2, 2, 2])
