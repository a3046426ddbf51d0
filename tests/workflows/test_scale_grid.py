"""The cells of a sweep: which there are, in which order, and what each of them is trained with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.evaluate.sanity import PROBED_IMAGES
from medspark.workflows.scale_grid import ScaleAtConfig, cells_of, timed_only, training_of

COUNTS = st.lists(st.integers(1, 8), min_size=1, max_size=3, unique=True)


def sweep(**changes: object) -> ScaleAtConfig:
    grid = {"processes": (1, 2, 4), "scaling": ("strong", "weak"), "mode": ("standard", "fused")}
    grid |= changes.pop("grid", {})  # type: ignore[arg-type]
    base = {"grid": grid, "train": {"batch_size": 32, "epochs": 7}, "seed": 5}
    return ScaleAtConfig.model_validate(base | changes)


@given(processes=COUNTS, repeats=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_repeats_of_a_point_differ_in_their_seed_and_in_nothing_else(
    processes: list[int], repeats: int, seed: int
) -> None:
    config = sweep(grid={"processes": processes}, repeats=repeats, seed=seed)
    points: dict[object, list[int]] = {}
    trained: dict[object, set[str]] = {}

    for cell in cells_of(config, 1):
        training = training_of(config, cell)
        point = cell.model_copy(update={"repeat": 0})
        points.setdefault(point, []).append(training.seed)
        same = training.model_copy(
            update={"seed": 0, "track": training.track.model_copy(update={"run_name": None})}
        )
        trained.setdefault(point, set()).add(same.model_dump_json())

    assert all(seeds == [seed + n for n in range(repeats)] for seeds in points.values())
    assert all(len(same) == 1 for same in trained.values())


@given(processes=COUNTS)
def test_a_strong_batch_stays_and_a_weak_one_grows(processes: list[int]) -> None:
    config = sweep(grid={"processes": processes})

    for cell in cells_of(config, 1):
        training = training_of(config, cell)
        wanted = {
            "strong": 32, "plain": 32, "weak": 32 * cell.world_size,
            "slice": max(1, 32 // max(processes)),
        }  # fmt: skip
        assert training.train.batch_size == wanted[cell.scaling]
        assert training.launch.processes == cell.world_size
        assert training.launch.ddp == (cell.scaling not in ("plain", "slice"))


def test_every_combination_is_a_cell_once_and_one_process_comes_first() -> None:
    config = sweep(grid={"data": (0.1, 1.0), "model": ("a", "b")}, repeats=2)

    cells = cells_of(config, 3)

    # one process, two and four strong, two and four weak; alone only on the largest share
    assert len(cells) == len(set(cells)) == 2 * 2 * 2 * (5 + 5 + 2)
    assert {cell.threads_per_rank for cell in cells} == {3}
    assert [cell.repeat for cell in cells] == sorted(cell.repeat for cell in cells)
    assert [(c.scaling, c.world_size, c.data_share) for c in cells[:7]] == [
        ("plain", 1, 1.0), ("slice", 1, 1.0), ("strong", 1, 1.0), ("strong", 2, 1.0),
        ("weak", 2, 1.0), ("strong", 4, 1.0), ("weak", 4, 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("at", "timed"), [("all", {"plain", "slice"}), ("largest", {"plain", "slice", 1, 2})]
)
def test_what_is_only_timed_is_attacked_with_next_to_nothing(at: str, timed: set[object]) -> None:
    config = sweep(test={"at": at, "images": 99, "attacks": ("pgd",), "steps": 3})

    for cell in cells_of(config, 1):
        training = training_of(config, cell)
        only = cell.scaling in timed or cell.world_size in timed
        assert timed_only(config, cell) == only
        assert training.evaluate.images == (1 if only else 99)
        assert training.evaluate.attacks == (("fgsm",) if only else ("pgd",))
        assert training.train.monitor.action == "off"
        assert training.evaluate.sanity_images == (0 if only else PROBED_IMAGES)


def test_a_cell_that_is_only_timed_takes_the_epochs_that_its_steps_need(write_shards) -> None:
    shards = write_shards(rows=64)
    config = sweep(shards=shards, warmup_steps=1, timed_steps=4)  # 64 rows: two steps an epoch

    epochs = {
        cell.scaling: training_of(config, cell).train.epochs
        for cell in cells_of(config, 1)
        if cell.world_size == 1
    }

    assert epochs == {"plain": 3, "slice": 1, "strong": 7}


def test_two_sets_of_batch_norms_are_asked_for_by_the_name_of_the_mode() -> None:
    config = sweep(grid={"mode": ("fused", "fused+dual_bn")}, weights={"net": "w.safetensors"},
                   model={"name": "net"})  # fmt: skip

    found = {cell.mode: training_of(config, cell) for cell in cells_of(config, 1)}

    assert {mode: (t.train.mode, t.train.dual_bn) for mode, t in found.items()} == {
        "fused": ("fused", False), "fused+dual_bn": ("fused", True),
    }  # fmt: skip
    assert found["fused"].model.weights == "w.safetensors"
    assert found["fused"].evaluate.eps == (config.attack.eps,)
