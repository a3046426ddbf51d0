"""The comparison at equal time: the same start and time for all, and no cell done twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from medspark.train.kinds import FINE_TUNING

TRAINERS = ("ours", "textbook", "art")


@pytest.fixture
def equal_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import equal_time

    before = torch.get_num_threads()
    yield equal_time
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore")
def test_all_trainers_train_for_the_time_and_what_is_done_is_not_done_again(
    equal_time: ModuleType, write_shards: Callable[..., Path], tmp_path: Path, capsys
) -> None:
    shards, output = write_shards(rows=40, side=32), tmp_path / "out" / "table.json"
    command = [
        *("--shards", str(shards), "--network", "resnet10t", "--threads", "1"),
        *("--seconds", "6", "--seeds", "3", "--images", "4"),
        *("--folder", str(tmp_path / "cells"), "--output", str(output)),
    ]

    equal_time.main(command)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.json")}
    capsys.readouterr()
    equal_time.main(command)

    cells = json.loads(output.read_text())["cells"]
    assert [(cell["trainer"], cell["seed"]) for cell in cells] == [(name, 3) for name in TRAINERS]
    assert all(cell["steps"] > 0 and cell["seconds"] >= 6 for cell in cells)
    assert len(kept) == len(TRAINERS)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    last = capsys.readouterr().out.split("| trainer |")[-1]
    assert [line.split()[1] for line in last.splitlines()[2:5]] == list(TRAINERS)


def test_all_trainers_start_from_the_same_network(
    equal_time: ModuleType, write_shards: Callable[..., Path]
) -> None:
    source = equal_time.open_source(write_shards(rows=40, side=32), equal_time.DataConfig())
    setup = equal_time.Setup("resnet10t", None, 1, None, 1e-3, 1)

    first, again, other = (equal_time.first_network(setup, source, seed) for seed in (0, 0, 1))

    name, weight = next(iter(first.backbone.named_parameters()))
    assert torch.equal(weight, again.backbone.get_parameter(name))
    assert not torch.equal(weight, other.backbone.get_parameter(name))


def test_ours_is_the_default_recipe_for_the_given_weights(equal_time: ModuleType) -> None:
    tuned = equal_time.our_recipe("mobilenetv2_100", "weights.safetensors", None).train
    random = equal_time.our_recipe("mobilenetv2_100", None, None).train
    asked = equal_time.our_recipe("mobilenetv2_100", "weights.safetensors", 2e-3).train

    assert {key: getattr(tuned, key) for key in FINE_TUNING} == FINE_TUNING
    assert random.label_smoothing == 0
    assert (asked.lr, asked.class_weights) == (2e-3, "balanced")
