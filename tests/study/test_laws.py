"""The laws of scaling: what is fitted to data made by a law is that law again."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.study.laws import (
    Cluster,
    StepModel,
    Window,
    all_reduce_constants,
    efficiency,
    fit_amdahl,
    fit_usl,
    mean_interval,
    project,
    steady,
    trend,
    usl,
)

shares = st.floats(0.0, 0.3)
speeds = st.floats(1.0, 1e4)
MODEL = StepModel(
    seconds_per_image=0.01, gradient_bytes=1e7, loader_images_per_second=1e4, image_bytes=4096
)


@given(base=speeds, contention=shares, coherency=st.floats(0.0, 0.01))
def test_the_scalability_law_is_found_again_in_speeds_that_follow_it(
    base: float, contention: float, coherency: float
) -> None:
    law = usl([1, 2, 4, 8], base=base, contention=contention, coherency=coherency)
    points = {n: [float(v)] * 2 for n, v in zip((1, 2, 4, 8), law, strict=True)}

    fit = fit_usl(points, resamples=5)

    assert fit is not None
    assert fit.base == pytest.approx(base, rel=1e-6)
    assert fit.contention == pytest.approx(contention, abs=1e-6)
    assert fit.coherency == pytest.approx(coherency, abs=1e-6)
    assert fit.largest_residual < 1e-6


@given(base=speeds, contention=shares)
def test_amdahls_law_is_the_one_without_coherency(base: float, contention: float) -> None:
    law = usl([1, 2, 4], base=base, contention=contention)
    points = {n: [float(v)] for n, v in zip((1, 2, 4), law, strict=True)}

    fit = fit_amdahl(points, resamples=5)

    assert fit is not None
    assert fit.contention == pytest.approx(contention, abs=1e-6)
    assert float(fit.speed(1024)) <= base / max(contention, 1e-9) * (1 + 1e-6) or contention < 1e-6


def test_the_interval_of_a_noisy_fit_holds_the_truth_and_shrinks_with_repeats() -> None:
    random = np.random.default_rng(0)

    def noisy(repeats: int) -> dict[int, list[float]]:
        law = dict(zip((1, 2, 4, 8), usl([1, 2, 4, 8], base=100, contention=0.1), strict=True))
        return {n: list(v * random.normal(1, 0.03, repeats)) for n, v in law.items()}

    few, many = fit_amdahl(noisy(3)), fit_amdahl(noisy(60))

    assert few is not None
    assert many is not None
    low, high = many.intervals["contention"]
    assert low <= 0.1 <= high
    wide_low, wide_high = few.intervals["contention"]
    assert high - low < wide_high - wide_low


def test_the_interval_of_a_fit_is_as_wide_as_theory_says() -> None:
    # With two counts the law goes through both; one process alone decides its base, whose
    # relative standard error is that of a mean: 95 % of draws lie within 1.96 of them.
    seconds = np.random.default_rng(1).normal(1, 0.05, 400) / 100
    points = {1: list(1 / seconds), 2: [150.0] * 400}
    error = seconds.std() / seconds.mean() / math.sqrt(len(seconds))

    fit = fit_amdahl(points, resamples=4000)

    assert fit is not None
    low, high = fit.intervals["base"]
    assert (high - low) / fit.base == pytest.approx(2 * 1.96 * error, rel=0.07)
    assert low < fit.base < high
    assert (fit.base - low) == pytest.approx(high - fit.base, rel=0.15)


def test_the_interval_of_a_mean_is_students() -> None:
    mean, interval = mean_interval([1.0, 2.0, 3.0])

    half = 4.30265 / 3**0.5  # t of 2 degrees of freedom at 97.5 %, times the standard error
    assert mean == 2
    assert interval == pytest.approx((2 - half, 2 + half), rel=1e-4)
    assert mean_interval([7.0]) == (7.0, None)


def test_the_residual_of_a_fit_is_its_largest_distance_from_a_median() -> None:
    fit = fit_amdahl({1: [100.0], 2: [100.0], 4: [400.0]}, resamples=2)

    assert fit is not None
    off = [abs(float(fit.speed(n)) / v - 1) for n, v in ((1, 100), (2, 100), (4, 400))]
    assert fit.largest_residual == pytest.approx(max(off))


@given(batch=st.integers(1, 512), processes=st.integers(2, 512))
def test_a_step_takes_what_its_parts_take(batch: int, processes: int) -> None:
    model = StepModel(
        seconds_per_image=0.01, seconds_per_step=0.2, gradient_bytes=1e8, overlap=0.25
    )
    cluster = Cluster(bandwidth=1e8, latency=1e-3)

    seconds, bound = model.step(processes, batch, cluster)

    compute = 0.2 + 0.01 * batch
    talk = 2 * (processes - 1) * (1 / processes + 1e-3)
    exposed = max(0.0, talk - 0.25 * compute)
    assert seconds == pytest.approx(compute + exposed)
    assert bound == ("network" if exposed > compute else "compute")
    assert model.speed(processes, batch, cluster) == pytest.approx(processes * batch / seconds)


def test_reading_that_is_slower_than_computing_binds() -> None:
    slow = StepModel(seconds_per_image=0.01, gradient_bytes=1, loader_images_per_second=50)
    shared = MODEL.model_copy(update={"image_bytes": 1e6})

    assert slow.step(1, 10, Cluster()) == (pytest.approx(0.2), "storage")
    assert shared.step(4, 10, Cluster(storage=1e6)) == (pytest.approx(40), "storage")


def test_hours_and_cost_count_from_submission_for_every_node() -> None:
    free = StepModel(seconds_per_image=0.01, gradient_bytes=1e-9)
    cluster = Cluster(startup_seconds=900, price=3, latency=0)

    seen = project(free, cluster, nodes=4, images=4e5, epochs=2, batch=10, largest_batch=40)

    # 8e5 images, 0.01 s each, on four nodes: 2000 s, and 900 to start
    assert seen.images_per_second == pytest.approx(400)
    assert seen.hours == pytest.approx(2900 / 3600)
    assert seen.cost == pytest.approx(4 * 3 * 2900 / 3600)
    assert (seen.batch, seen.bound) == (10, "compute")


def test_no_law_is_fitted_to_too_few_process_counts() -> None:
    assert fit_amdahl({1: [100.0, 99.0]}) is None
    assert fit_usl({1: [100.0], 2: [180.0]}) is None


def test_speed_that_grows_faster_than_the_processes_has_no_negative_serial_part() -> None:
    fit = fit_amdahl({1: [100.0], 2: [210.0]})

    assert fit is not None
    assert fit.contention == 0


@given(base=speeds, processes=st.integers(1, 1000))
def test_efficiency_of_perfect_scaling_is_one(base: float, processes: int) -> None:
    assert efficiency(base * processes, processes, base) == pytest.approx(1)


def test_steady_speed_leaves_the_warm_up_out_and_weighs_windows_by_time() -> None:
    windows = [Window(5, 1.0, 0.9), Window(15, 100.0, 0.0), Window(20, 50.0, 0.4)]

    speed = steady(windows, warmup_steps=5)

    assert speed is not None
    assert speed.images_per_second == pytest.approx(15 / (10 / 100 + 5 / 50))
    assert speed.data_wait_share == pytest.approx(0.4 * 0.1 / 0.2)


def test_a_run_that_is_all_warm_up_gives_its_last_window() -> None:
    assert steady([Window(3, 7.0, 0.1)], warmup_steps=5) == (7.0, 0.1)
    assert steady([], warmup_steps=5) is None


@given(
    latency=st.floats(1e-6, 1e-3),
    bandwidth=st.floats(1e7, 1e10),
    processes=st.integers(2, 64),
)
def test_the_constants_of_an_all_reduce_are_found_again(
    latency: float, bandwidth: float, processes: int
) -> None:
    cluster = Cluster(latency=latency, bandwidth=bandwidth)
    timed = [
        (size, MODEL.model_copy(update={"gradient_bytes": size}).all_reduce(processes, cluster))
        for size in (1e3, 1e5, 1e7, 1e9)
    ]

    found = all_reduce_constants(processes, timed)

    assert found == (pytest.approx(latency, rel=1e-3), pytest.approx(bandwidth, rel=1e-3))


def test_one_process_has_no_all_reduce() -> None:
    with pytest.raises(ValueError, match="two processes"):
        all_reduce_constants(1, [(1e6, 0.1)])
    assert MODEL.all_reduce(1, Cluster()) == 0


@given(batch=st.integers(1, 256), nodes=st.integers(1, 4096))
def test_no_projection_is_faster_than_perfect_scaling(batch: int, nodes: int) -> None:
    seen = project(
        MODEL, Cluster(), nodes=nodes, images=1e6, epochs=1, batch=batch, largest_batch=10**9
    )

    assert 0 < seen.efficiency <= 1 + 1e-9
    assert seen.cost == pytest.approx(nodes * seen.hours)


@pytest.mark.parametrize(
    ("cluster", "images", "bound"),
    [
        (Cluster(startup_seconds=0), 1e8, "compute"),
        (Cluster(startup_seconds=0, bandwidth=1e6), 1e8, "network"),
        (Cluster(startup_seconds=0, storage=1e5), 1e8, "storage"),
        (Cluster(startup_seconds=3600), 1e4, "start-up"),
    ],
)
def test_the_resource_that_binds_is_named_with_what_to_change(
    cluster: Cluster, images: float, bound: str
) -> None:
    seen = project(MODEL, cluster, nodes=64, images=images, epochs=1, batch=32, largest_batch=10**9)

    assert seen.bound == bound
    assert seen.advice


def test_a_global_batch_that_is_used_up_is_what_binds() -> None:
    slow = Cluster(bandwidth=2e8, startup_seconds=0)

    seen = project(MODEL, slow, nodes=1024, images=1e9, epochs=1, batch=32, largest_batch=1024)

    assert (seen.batch, seen.bound) == (1, "batch")


def test_a_trend_is_told_from_chance_by_the_repeats() -> None:
    falling = [{100: 0.05 + d, 1000: 0.03 + d, 10000: 0.01 + d} for d in (0.0, 0.004, -0.003)]
    random = [{100: 0.02, 1000: 0.05}, {100: 0.05, 1000: 0.01}, {100: 0.03, 1000: 0.03}]

    fell, unclear, alone = trend(falling), trend(random), trend(falling[:1])

    assert fell is not None
    assert fell.slope == pytest.approx(-0.02)
    assert fell.direction == "falls"
    assert unclear is not None
    assert unclear.direction == "unclear"
    assert alone is not None
    assert alone.interval is None
    assert trend([{100: 0.05}]) is None


def test_the_best_number_of_processes_is_where_the_law_turns() -> None:
    counts = (1, 2, 4, 8)
    law = usl(counts, base=10, contention=0.1, coherency=0.01)

    fit = fit_usl({n: [float(v)] for n, v in zip(counts, law, strict=True)}, resamples=2)

    assert fit is not None
    assert fit.best_processes == pytest.approx(math.sqrt(0.9 / 0.01), rel=1e-3)
