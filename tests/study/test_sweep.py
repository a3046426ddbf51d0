"""What follows from all cells of a sweep: curves, the price of robustness, and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.study.forecast import predictions, step_models
from medspark.study.laws import Cluster, StepModel, project, usl
from medspark.study.scale_report import compare_sweeps, summary_note, table, write_sweep
from medspark.study.sweep import Curve, Price, Probe, ScaleCell, ScalePoint, Sweep, curves, prices

PROBE = Probe(processes=2, latency=1e-4, bandwidth=1e9, loader_images_per_second=1e5)


def _measured(
    mode: str, processes: int, share: float, repeat: int, *, scaling: str = "strong"
) -> ScaleCell:
    """Standard training is as good at any size; the defended one loses less on more images."""
    price = 0.0 if mode == "standard" else 0.02 / (10 * share) + 0.001 * repeat
    cell = {
        "model": "net", "mode": mode, "data_share": share, "scaling": scaling,
        "world_size": processes, "threads_per_rank": 1, "repeat": repeat,
    }  # fmt: skip
    return ScaleCell(
        point=ScalePoint.model_validate(cell),
        fingerprint=f"{mode}{processes}{share}{repeat}{scaling}",
        status="finished",
        oversubscribed=processes > 2,
        timed_only=scaling == "plain",
        train_images=round(1000 * share),
        global_batch=32,
        images_per_second=100 * processes * (0.9 if processes > 1 else 1) + repeat,
        startup={"spawn": 5.0, "join": 3.0, "total": 8.0},
        clean_auroc=None if scaling == "plain" else 0.95 - price,
        worst_case_accuracy=None if scaling == "plain" else 0.6,
    )


@pytest.fixture(scope="module")
def cells() -> list[ScaleCell]:
    grid = [
        _measured(mode, processes, share, repeat)
        for repeat in range(3)
        for mode in ("standard", "fused")
        for share in (0.1, 0.3, 1.0)
        for processes in (1, 2, 4)
    ]
    return [*grid, _measured("standard", 1, 1.0, 0, scaling="plain")]


def test_a_curve_is_drawn_on_the_largest_share_and_keeps_no_ddp_apart(
    cells: list[ScaleCell],
) -> None:
    standard, fused = curves(cells)

    assert standard.mode == "standard"
    assert standard.speeds == {1: [100, 101, 102], 2: [180, 181, 182], 4: [360, 361, 362]}
    assert standard.plain == 100
    assert fused.plain is None
    assert standard.efficiencies[2] == pytest.approx(181 / 202)


def test_points_with_more_threads_than_cores_are_marked_and_not_learnt_from(
    cells: list[ScaleCell],
) -> None:
    (curve, _) = curves(cells)

    assert curve.oversubscribed == [4]
    assert curve.usl is None  # two honest process counts do not tell its three terms
    assert curve.amdahl is not None


def test_weak_scaling_starts_from_the_same_single_process(cells: list[ScaleCell]) -> None:
    weak = [_measured("standard", 2, 1.0, repeat, scaling="weak") for repeat in range(3)]

    found = {(c.mode, c.scaling): c for c in curves([*cells, *weak])}

    assert list(found["standard", "weak"].speeds) == [1, 2]
    assert ("fused", "weak") not in found


def test_the_price_of_robustness_is_paired_by_repeat_and_said_in_a_sentence(
    cells: list[ScaleCell],
) -> None:
    (price,) = prices(cells)

    assert list(price.by_images) == [100, 300, 1000]
    assert price.by_images[1000] == pytest.approx([0.002, 0.003, 0.004])
    assert price.trend is not None
    assert price.trend.direction == "falls"
    seen = "net: in clean AUROC, fused cost 0.021 on 100 images and cost 0.003 on 1000 images"
    assert price.sentence.startswith(seen)
    assert price.sentence.endswith("the price of robustness shrank with data.")


def test_one_repeat_cannot_tell_a_trend_from_chance(cells: list[ScaleCell]) -> None:
    (price,) = prices([m for m in cells if m.point.repeat == 0])

    assert "1 repeat cannot tell a trend from chance" in price.sentence


def test_a_gain_is_called_one_and_one_size_of_data_is_told_once() -> None:
    price = Price(model="net", mode="fused", by_images={1000: [-0.02, -0.01]}, trend=None)

    assert price.sentence == (
        "net: in clean AUROC, fused gained 0.015 on 1000 images; one size of data shows no trend."
    )


def test_the_report_is_one_page_that_needs_nothing_else(
    cells: list[ScaleCell], tmp_path: Path
) -> None:
    drawn = curves(cells)
    models = step_models(drawn, PROBE, gradient_bytes={"net": 1e7}, image_bytes=4096)
    failed = cells[0].model_copy(update={"status": "failed", "failure": "rank 1 was <killed>"})
    sweep = Sweep(
        name="a sweep",
        command="spark-submit jobs/scale_at.py",
        hardware="2 cores",
        dataset="/shards",
        dataset_digest="ab" * 32,
        cells=[*cells[1:], failed],
        curves=drawn,
        prices=prices(cells),
        probe=PROBE,
        step_models=models,
        predictions=predictions(drawn, models, PROBE, batch_size=32),
        projections={
            name: [
                project(
                    model, Cluster(), nodes=8, images=1e6, epochs=1, batch=32, largest_batch=8192
                )
            ]
            for name, model in models.items()
        },
    )

    page = write_sweep(tmp_path, sweep).read_text()

    assert page.count("data:image/png;base64,") == 6
    assert "http" not in page
    assert "rank 1 was &lt;killed&gt;" in page
    assert "the price of robustness shrank with data" in page
    assert Sweep.model_validate_json((tmp_path / "sweep.json").read_bytes()) == sweep
    assert table(sweep) in summary_note(sweep)
    assert "| 4 × 1* |" in table(sweep)
    assert compare_sweeps(tmp_path, [sweep, sweep]).read_text().count("<h2>a sweep</h2>") == 2


def test_two_sizes_of_batch_tell_what_a_step_takes_besides_its_images() -> None:
    whole, part = (
        _measured("standard", 1, 1.0, 0, scaling=scaling) for scaling in ("plain", "slice")
    )
    whole = whole.model_copy(update={"images_per_second": 32 / (0.05 + 32 * 0.01)})
    part = part.model_copy(
        update={"global_batch": 16, "images_per_second": 16 / (0.05 + 16 * 0.01)}
    )

    drawn = curves([whole, part, _measured("standard", 1, 1.0, 0)])
    (model,) = step_models(drawn, PROBE, gradient_bytes={"net": 1e7}, image_bytes=1).values()

    assert model.seconds_per_image == pytest.approx(0.01)
    assert model.seconds_per_step == pytest.approx(0.05)


def test_a_point_is_foreseen_from_one_process_and_held_against_what_was_measured(
    cells: list[ScaleCell],
) -> None:
    drawn = curves(cells)
    models = step_models(drawn, PROBE, gradient_bytes={"net": 1e7}, image_bytes=4096)

    found = predictions(drawn, models, PROBE, batch_size=32)

    assert {p.world_size for p in found} == {2}  # four processes shared two cores
    (standard, _) = found
    assert standard.measured == 181
    assert standard.predicted == pytest.approx(200, rel=0.05)
    assert standard.error == pytest.approx(standard.predicted / 181 - 1)


@given(
    per_step=st.floats(0.01, 1), per_image=st.floats(0.001, 0.1), world=st.integers(2, 64),
    scaling=st.sampled_from(["strong", "weak"]),
)  # fmt: skip
def test_a_process_has_a_part_of_a_strong_batch_and_the_whole_of_a_weak_one(
    per_step: float, per_image: float, world: int, scaling: Any
) -> None:
    curve = Curve(model="net", mode="fused", scaling=scaling, data_share=1, speeds={world: [50.0]})
    model = StepModel(seconds_per_image=per_image, seconds_per_step=per_step, gradient_bytes=1e-9)
    fast = PROBE.model_copy(update={"latency": 0.0, "loader_images_per_second": 1e30})

    (found,) = predictions([curve], {"net fused": model}, fast, batch_size=640)

    own = 640 if scaling == "weak" else 640 / world
    assert found.predicted == pytest.approx(world * own / (per_step + per_image * own))
    assert (found.scaling, found.world_size, found.measured) == (scaling, world, 50)
    assert found.error == pytest.approx(found.predicted / 50 - 1)


def test_the_largest_of_three_counts_is_foreseen_from_the_smaller_ones() -> None:
    law = {n: [float(v)] for n, v in zip((1, 2, 4), usl([1, 2, 4], base=9, contention=0.1),
                                         strict=True)}  # fmt: skip
    curve = Curve(model="net", mode="fused", scaling="strong", data_share=1, speeds=law | {8: [1]})

    found = predictions([curve], {}, PROBE, batch_size=32)
    two = predictions([curve.model_copy(update={"speeds": {1: [9], 2: [10]}})], {}, PROBE,
                      batch_size=32)  # fmt: skip

    assert [(p.world_size, p.measured) for p in found] == [(8, 1)]
    assert found[0].predicted == pytest.approx(float(usl(8, base=9, contention=0.1)))
    assert two == []


@pytest.mark.parametrize(
    ("speeds", "found"),
    [
        ({8: 8 / 0.13, 32: 32 / 0.37}, (0.01, 0.05)),
        ({32: 80.0}, (1 / 80, 0.0)),
        ({8: 100.0, 32: 90.0}, (1 / 90, 0.0)),  # noise: a step would cost less than nothing
        ({8: 10.0, 32: 80.0}, (1 / 80, 0.0)),  # noise: images would be free
    ],
)
def test_seconds_per_image_and_per_step_come_from_two_sizes_of_batch(
    speeds: dict[int, float], found: tuple[float, float]
) -> None:
    curve = Curve(model="net", mode="fused", scaling="strong", data_share=1, alone=speeds,
                  speeds={1: [1.0]})  # fmt: skip

    (model,) = step_models([curve], PROBE, gradient_bytes={"net": 7}, image_bytes=3).values()

    assert (model.seconds_per_image, model.seconds_per_step) == pytest.approx(found)
    assert (model.gradient_bytes, model.image_bytes) == (7, 3)
    assert model.loader_images_per_second == PROBE.loader_images_per_second
