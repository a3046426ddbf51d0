"""A resident network that serves one client after the other: nothing passes between clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from torch import Tensor, nn

from medspark.federate.adversary import Known
from medspark.federate.adversary.a3fl import A3FL
from medspark.federate.adversary.edge_case import Projected
from medspark.federate.client import Answer, Liar, Memory, Task, train_client
from medspark.federate.local import LocalConfig
from medspark.federate.resident import Resident
from medspark.federate.weights import pack
from medspark.models.classifier import batch_norms

FIRST, SECOND = np.arange(10), np.arange(9, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write(tmp_path_factory.mktemp("resident") / "shards")


def network() -> nn.Module:
    """Return a network with dropout, and a batch norm that counts its batches."""
    model: Any = small.network()
    model.backbone.insert(8, nn.Dropout(0.5))
    next(batch_norms(model)).momentum = None
    return model


def answer(model: Any, folder: Path, config: LocalConfig, rows: Any, **known: Any) -> Answer:
    task = Task(pack(network(), config.batch_norm), round=2, seed=5)
    return train_client(model, small.rows_of(folder, rows), task, config, **known)


def bits(answer: Answer) -> list[Any]:
    memory = answer.memory
    vectors = answer.weights, memory.norms, memory.control, answer.control_change
    return [answer.loss, *(None if v is None else v.tobytes() for v in vectors)]


CONFIGS = {
    "average": small.local(batch_norm="average"),
    "local": small.local(batch_norm="local"),
    "frozen": small.local(batch_norm="frozen"),
    "reestimate": small.local("fused_noise", batch_norm="reestimate"),
    "calfat": small.local("pgd", calibrate="calfat"),
    "momentum": small.local(momentum=0.9, weight_decay=1e-3),
    "adamw": small.local(optimiser="adamw", lr=1e-3),
    "scaffold": small.local(prox=1.0, scaffold=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_client_answers_the_same_after_another_as_on_a_new_network(
    folder: Path, config: LocalConfig
):
    resident = network()
    answer(resident, folder, config, FIRST)

    after = answer(resident, folder, config, SECOND)

    assert bits(after) == bits(answer(network(), folder, config, SECOND))


@pytest.mark.parametrize("adversary", [A3FL(steps=2, size=3), Projected(radius=0.02)], ids=repr)
def test_a_malicious_client_leaves_nothing_behind(folder: Path, adversary: Any):
    resident, known = network(), Known(edge=torch.ones(4, 1, 12, 12))
    answer(resident, folder, small.local(), FIRST, liar=Liar(adversary, known))

    after = answer(resident, folder, small.local(), SECOND)

    assert bits(after) == bits(answer(network(), folder, small.local(), SECOND))


class Breaks(nn.Module):
    """Passes images on, and raises in pass number ``at``."""

    at = 0

    def forward(self, images: Tensor) -> Tensor:
        self.at -= 1
        if self.at == 0:
            raise RuntimeError("out of memory")
        return images


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("policy", ["average", "local", "frozen", "reestimate"])
def test_a_client_that_fails_between_two_passes_leaves_nothing_behind(
    folder: Path, policy: Any, prepared: bool
):
    def made() -> Any:
        model: Any = network()
        return Resident.prepared(model, (1, 12, 12), config) if prepared else Resident.of(model)

    config = small.local("fused_noise", batch_norm=policy)
    resident = made()
    resident.trained.backbone.append(Breaks())
    resident.trained.backbone[-1].at = 4
    with pytest.raises(RuntimeError, match="out of memory"):
        answer(resident, folder, config, FIRST)

    after = answer(resident, folder, config, SECOND)

    assert bits(after) == bits(answer(made(), folder, config, SECOND))


@pytest.mark.parametrize("policy", ["average", "local", "frozen", "reestimate"])
def test_all_that_is_not_exchanged_is_afterwards_as_before(folder: Path, policy: Any):
    model = network()
    norms = {
        name: value.clone() for name, value in model.state_dict().items() if "backbone.1" in name
    }

    answer(model, folder, small.local(batch_norm=policy), FIRST, memory=Memory())

    exchanged = {"average": ("weight", "bias", "mean", "var"), "local": ()}
    for name, value in norms.items():
        if not name.endswith(exchanged.get(policy, ("weight", "bias"))):
            assert torch.equal(model.state_dict()[name], value), name
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
