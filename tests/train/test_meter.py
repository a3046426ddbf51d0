"""Reports of steps are summed over the window, the epoch and the run."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from medspark.train import meter as meters
from medspark.train.engine import Report
from medspark.train.meter import Meter
from medspark.train.world import World


class Kept:
    def __init__(self) -> None:
        self.records: dict[int, Mapping[str, float]] = {}

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        self.records[step] = metrics


class Clock:
    """A clock that stands still until it is moved."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meters, "time", clock)
    return clock


def report(*figures: float) -> Report:
    return Report(torch.tensor(figures), rate=0.1, eps=2 / 255, gradient_norm=torch.tensor(3.0))


def test_steps_are_recorded_under_their_numbers_and_speed_with_the_last(clock: Clock) -> None:
    kept = Kept()
    meter = Meter(World(0, 0, 1, torch.device("cpu")), kept)
    meter.begin()
    meter.add(report(0.5, 6, 4, 8))
    meter.add(report(0.25, 2, 1, 4))
    clock.now += 3

    meter.publish(12, 1, waited=1.5)

    assert list(kept.records) == [11, 12]
    assert kept.records[11] == pytest.approx(
        {"loss": 0.5, "train/clean_accuracy": 0.75, "train/attacked_accuracy": 0.5, "lr": 0.1,
         "eps": 2 / 255, "gradient_norm": 3, "epoch": 1}
    )  # fmt: skip
    assert kept.records[12]["images_per_second"] == 4
    assert kept.records[12]["data_wait_share"] == 0.5


def test_a_window_is_measured_from_the_end_of_the_last_one(clock: Clock) -> None:
    kept = Kept()
    meter = Meter(World(0, 0, 1, torch.device("cpu")), kept)
    meter.begin()
    for step, waited in ((1, 1.0), (2, 1.5)):
        meter.add(report(0.5, 6, 4, 8))
        clock.now += 2
        meter.publish(step, 1, waited=waited)

    assert [kept.records[step]["data_wait_share"] for step in (1, 2)] == [0.5, 0.25]
    assert (meter.images, meter.steps, meter.seconds) == (16, 2, 4)
    assert (meter.images_per_second, meter.wait_share) == (4, 1.5 / 4)
    assert meter.share_of_step(0.5) == 0.25  # of two seconds that a step took


def test_accuracies_are_those_of_the_images_since_they_were_last_taken(clock: Clock) -> None:
    meter = Meter(World(0, 0, 1, torch.device("cpu")), Kept())
    meter.add(report(0.5, 6, 4, 8))
    meter.add(report(0.5, 0, 2, 8))
    clock.now += 1
    meter.publish(2, 1)

    assert meter.take_accuracies() == (6 / 16, 6 / 16)
    assert meter.take_accuracies() == (0, 0)
    meter.add(report(0.5, 3, 1, 4))
    clock.now += 1
    meter.publish(3, 1)
    assert meter.take_accuracies() == (3 / 4, 1 / 4)


def test_what_came_before_the_clock_was_started_is_not_training(clock: Clock) -> None:
    kept = Kept()
    meter = Meter(World(0, 0, 1, torch.device("cpu")), kept)
    clock.now += 50
    meter.begin()
    meter.add(report(0.5, 6, 4, 8))
    clock.now += 2
    meter.publish(1, 1)
    meter.publish(1, 1)

    assert kept.records[1]["images_per_second"] == 4
    assert meter.seconds == 2


def test_the_time_of_a_step_leaves_out_those_up_to_the_first_record_if_there_are_others(
    clock: Clock,
) -> None:
    meter = Meter(World(0, 0, 1, torch.device("cpu")), Kept())
    assert meter.seconds_per_step == 0
    meter.begin()
    meter.add(report(0.5, 6, 4, 8))
    clock.now += 30
    meter.publish(1, 0)
    assert meter.seconds_per_step == 30

    for step, seconds in ((3, 2.0), (5, 4.0)):
        meter.add(report(0.5, 6, 4, 8))
        meter.add(report(0.5, 6, 4, 8))
        clock.now += seconds
        meter.publish(step, 0)

    assert meter.seconds_per_step == pytest.approx(6 / 4)


def test_a_pause_of_the_machine_is_no_part_of_the_time_of_a_step(clock: Clock) -> None:
    meter = Meter(World(0, 0, 1, torch.device("cpu")), Kept())
    meter.begin()

    for step, seconds in enumerate((30.0, 1.0, 1.5, 90.0, 1.0), start=1):
        meter.add(report(0.5, 6, 4, 8))
        clock.now += seconds
        meter.publish(step, 0)

    assert meter.seconds_per_step == pytest.approx((1 + 1.5 + 1.25 + 1) / 4)
    assert meter.seconds == 123.5
