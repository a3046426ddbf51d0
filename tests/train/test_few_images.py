"""More processes than images in a step: those without one take part and change nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import few_images
import numpy as np
import pytest
import torch
from array_shards import write_arrays
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from medspark.errors import UsageError
from medspark.train.config import FitConfig, TrainConfig, check_ranks
from medspark.train.loop import fit
from medspark.train.world import World

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

HERE = Path(__file__).parent
ALONE = World(0, 0, 1, torch.device("cpu"))
Four = tuple[Path, dict[int, float], dict[int, float]]


def fit_config(shards: Path, run_dir: Path, **train: Any) -> FitConfig:
    """Return a training of 47 images in batches of at most 4: some have 3."""
    return FitConfig.model_validate(
        {
            "shards": shards,
            "run_dir": run_dir,
            "model": {"name": "test_efficientnet"},
            "attack": {"eps": "8/255"},
            "checkpoint": {"every_steps": 5},
            "train": {"epochs": 1, "batch_size": 4, "batch_norm": "frozen", "precision": "fp32"}
            | train,
            "evaluate": {"attacks": ["fgsm"], "sanity_images": 0, "images": 8},
        }
    )


def run(folder: Path, config: FitConfig, *, processes: int, **task: Any) -> dict[int, float]:
    """Run few_images.py in some processes; return the loss of every step of the training."""
    task = {"results": False, "stop_at": None, "fit": config.model_dump(mode="json")} | task
    (folder / "task.json").write_text(json.dumps(task))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = ["--nproc_per_node", str(processes), str(HERE / "few_images.py"), str(folder)]
    subprocess.run(
        [*torchrun, *program],
        check=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    written = [folder / f"losses-{processes}-{rank}.json" for rank in range(processes)]
    first, *others = [json.loads(path.read_text()) for path in written]
    assert all(other == first for other in others)
    return {int(step): loss for step, loss in first.items()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (47, 32, 32, 1), dtype=np.uint8)
    splits = dict.fromkeys(("train", "val", "test"), (images, np.arange(47) % 2))
    return write_arrays(tmp_path_factory.mktemp("few"), splits, shards=2, rows_per_group=8)


@pytest.fixture(scope="module")
def four(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Four:
    """Four processes that are stopped at step 8, and three that go on."""
    folder = tmp_path_factory.mktemp("four")
    config = fit_config(shards, folder / "run", log_every=1)
    before = run(folder, config, processes=4, results=True, stop_at=8)
    return folder, before, run(folder, config, processes=3)


def found(four: Four, name: str) -> list[dict[str, Tensor]]:
    return [load_file(four[0] / f"{name}, rank {rank}.safetensors") for rank in range(4)]


@pytest.mark.parametrize("added", ["", " by DDP"])
@pytest.mark.parametrize("way", few_images.WAYS)
def test_the_gradient_is_that_of_the_images_in_every_mode(way: str, added: str, four: Four) -> None:
    name = f"gradient of {way}"
    expected = few_images.RESULTS[name](ALONE)

    for gradient in found(four, name + added):
        assert gradient.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(gradient[key], value, rtol=1e-2, atol=1e-4)


def test_with_two_norms_every_rank_has_one_and_the_same_gradient(four: Four) -> None:
    first, *others = found(four, "gradient with two norms")

    assert any("auxiliary" in name and value.any() for name, value in first.items())
    for other in others:
        assert all(torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize("added", ["", " by DDP"])
def test_who_has_seen_no_image_has_no_say_in_the_statistics(added: str, four: Four) -> None:
    ranks = found(four, f"statistics{added}")
    names = [name.removeprefix("own/") for name in ranks[0] if name.startswith("own/")]

    assert names
    for name in names:
        assert ranks[0][f"own/{name}"].unique().numel() == 1  # as it was made: 0 or 1
        mean = sum(rank[f"own/{name}"] for rank in ranks[1:]) / 3
        for rank in ranks:
            torch.testing.assert_close(rank[f"once/{name}"], mean)
            assert torch.equal(rank[f"twice/{name}"], rank[f"once/{name}"])


@pytest.mark.parametrize("count", [4, 8])
def test_elastic_exact_gives_the_same_bits_with_and_without_idle_processes(
    count: int, four: Four
) -> None:
    expected = few_images.exact(ALONE, count)

    for tensors in found(four, f"exact {count}"):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], value) for name, value in expected.items())


def test_virtual_shards_without_an_image_have_no_say_in_the_statistics() -> None:
    few, many = (few_images.exact(ALONE, count) for count in (4, 16))

    names = [name for name in few if "running" in name]
    assert names
    for name in names:
        torch.testing.assert_close(few[name], many[name], rtol=1e-3, atol=1e-4)


def test_four_processes_and_after_a_loss_three_train_as_one_does(
    four: Four, shards: Path, tmp_path: Path
) -> None:
    _, before, after = four
    alone = few_images.Losses()
    fit(fit_config(shards, tmp_path / "alone", log_every=1), ALONE, alone)

    together = before | after
    assert min(after) == 6  # the step after the checkpoint
    assert list(together) == list(alone.by_step) == list(range(1, 13))
    assert list(together.values()) == pytest.approx(list(alone.by_step.values()), rel=1e-2)


@pytest.mark.parametrize(
    ("train", "ranks", "sentence"),
    [
        ({"batch_size": 3}, 4, r"train\.batch_size 3 .* 4 processes"),
        ({"elastic": "exact"}, 3, r"train\.virtual_shards 4 .* 3 processes"),
        ({"elastic": "exact", "virtual_shards": 6}, 2, r"train\.virtual_shards 6"),
    ],
)
def test_processes_that_cannot_share_a_step_are_refused_before_anything_is_read(
    train: dict[str, Any], ranks: int, sentence: str
) -> None:
    config = fit_config(Path("/nowhere"), Path("unused"), **train)

    with pytest.raises(UsageError, match=sentence):
        fit(config, World(0, 0, ranks, torch.device("cpu")), few_images.Losses())


@given(st.integers(0, 40), st.integers(1, 40), st.sampled_from([None, 1, 2, 4, 8, 16]))
def test_as_many_processes_as_can_share_a_step_are_the_most(
    available: int, batch: int, shards: int | None
) -> None:
    exact = {} if shards is None else {"elastic": "exact", "virtual_shards": shards}
    train = TrainConfig.model_validate({"batch_size": batch} | exact)

    most = train.most_ranks(available)

    allowed = [ranks for ranks in range(1, available + 1) if can(train, ranks)]
    assert most == max(allowed, default=0)
    check_ranks(train, most)


def can(train: TrainConfig, ranks: int) -> bool:
    try:
        check_ranks(train, ranks)
    except UsageError:
        return False
    return True
