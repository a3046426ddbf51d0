"""Tasks that stay: answers in order, state between steps, and what happens when one dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from medspark.errors import RunError
from medspark.files import write_whole
from medspark.launch import standing
from medspark.launch.standing import StandingTasks, _serve, _steps, standing_tasks

ROOT = Path(__file__).parents[2]


def counting(folder: Path) -> Callable[[], Any]:
    """Return the maker of a worker that counts its steps, with the faults that a step asks for."""

    class Counting:  # local, so that it is pickled by value
        def __init__(self) -> None:
            self.steps = 0

        def do(self, step: dict[str, Any], part: int) -> dict[str, Any]:
            self.steps += 1
            if part == step.get("bad"):
                with (folder / "tried").open("a") as file:
                    file.write("x")
                if (folder / "tried").stat().st_size <= step["times"]:
                    if step["fault"] == "dies":
                        os._exit(1)
                    raise RunError("This part cannot be done.")
            return {"part": part, "steps": self.steps, "name": step.get("name"), "pid": os.getpid()}

    return Counting


@contextmanager
def two_tasks(spark: Any, folder: Path) -> Iterator[StandingTasks]:
    with standing_tasks(spark, folder, counting(folder), tasks=2) as crew:
        yield crew


# --- without Spark ---


def test_a_task_goes_on_with_the_newest_step_if_others_did_one_without_it(tmp_path: Path):
    step(tmp_path, 0)
    steps = _steps(tmp_path)
    assert next(steps)[0] == 0
    (tmp_path / "step-00000000.json").unlink()  # step 1 came and went
    step(tmp_path, 2)

    assert next(steps) == (2, {"number": 2})


def test_steps_are_over_if_the_driver_ends_or_its_folder_has_gone(tmp_path: Path):
    step(tmp_path, 3, kind="end")

    assert list(_steps(tmp_path)) == []
    assert list(_steps(tmp_path / "gone")) == []


def test_a_part_that_is_answered_is_not_done_again_and_threads_are_restored(tmp_path: Path):
    threads = torch.get_num_threads()
    step(tmp_path, 0, parts=1)
    (tmp_path / "answer-00000000-00000.json").write_text("before")
    later = threading.Timer(0.3, lambda: step(tmp_path, 1, kind="end"))
    later.start()

    _serve(tmp_path, 0, lambda: None, threads + 1)  # type: ignore[arg-type, return-value]

    assert (tmp_path / "answer-00000000-00000.json").read_text() == "before"
    assert torch.get_num_threads() == threads


def test_a_task_in_the_midst_of_its_work_ends_if_the_folder_of_its_driver_goes(tmp_path: Path):
    step(tmp_path / "own", 0, parts=1)
    code = (
        "import sys, time; from pathlib import Path; from medspark.launch.standing import _serve\n"
        "class Worker:\n def do(self, *_): print(flush=True); time.sleep(600)\n"
        "_serve(Path(sys.argv[1]), 0, Worker, 1)"
    )
    words = [sys.executable, "-c", code, tmp_path / "own"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT) as task:
        assert task.stdout is not None
        try:
            task.stdout.readline()

            shutil.rmtree(tmp_path / "own")

            assert task.wait(60) == 1
        finally:
            task.kill()  # else a task that goes on would hold up the end of the block


def step(folder: Path, number: int, **more: Any) -> None:
    folder.mkdir(exist_ok=True)
    write_whole(folder / f"step-{number:08d}.json", json.dumps(more or {"number": number}))


# --- with Spark ---


@pytest.mark.spark
def test_answers_come_in_order_and_tasks_keep_what_they_know(spark: Any, tmp_path: Path):
    with two_tasks(spark, tmp_path) as crew:
        answers = [crew.do({"name": n}, parts) for n, parts in enumerate((2, 1, 1, 1, 2))]

    assert [[each["part"] for each in some] for some in answers] == [[0, 1], [0], [0], [0], [0, 1]]
    assert [[each["name"] for each in some] for some in answers] == [[0, 0], [1], [2], [3], [4, 4]]
    assert [each["steps"] for each in answers[-1]] == [5, 2]
    assert len({each["pid"] for some in answers for each in some}) == 2


@pytest.mark.spark
def test_late_answers_to_a_driver_that_was_killed_are_none_of_the_next(spark: Any, tmp_path: Path):
    killed = tmp_path / "tasks" / "01234567"
    step(killed.parent, 0)  # makes the folder of all drivers
    step(killed, 0)
    with two_tasks(spark, tmp_path) as crew:
        assert not killed.exists()
        for folder in (killed.parent, killed):  # as of earlier versions, and of this one
            folder.mkdir(exist_ok=True)
            (folder / "answer-00000000-00000.json").write_text('"late"')

        answers = crew.do({}, 2)

    assert [each["part"] for each in answers] == [0, 1]


@pytest.mark.spark
def test_a_task_that_dies_is_started_again_and_the_other_goes_on(spark: Any, tmp_path: Path):
    with two_tasks(spark, tmp_path) as crew:
        before = crew.do({}, 2)
        after = crew.do({"bad": 1, "times": 1, "fault": "dies"}, 2)

    assert [each["steps"] for each in after] == [2, 1]
    assert before[0]["pid"] == after[0]["pid"]
    assert before[1]["pid"] != after[1]["pid"]


@pytest.mark.spark
@pytest.mark.slow
def test_a_job_that_fails_is_started_again_at_its_step(spark: Any, tmp_path: Path):
    with two_tasks(spark, tmp_path) as crew:
        crew.do({}, 2)
        after = crew.do({"bad": 0, "times": 4, "fault": "raises", "name": "again"}, 2)
        last = crew.do({}, 2)

    assert [each["name"] for each in after] == ["again", "again"]
    assert [each["part"] for each in last] == [0, 1]


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [("raises", "This part cannot be done."), ("dies", "a Python worker ended unexpectedly")],
)
def test_a_job_that_fails_twice_at_a_step_fails_with_the_cause(
    spark: Any, tmp_path: Path, fault: str, said: str
):
    with two_tasks(spark, tmp_path) as crew, pytest.raises(RunError, match=said):
        crew.do({"bad": 1, "times": 100, "fault": fault}, 2)

    assert (tmp_path / "tried").stat().st_size == 8  # two jobs of four attempts


@pytest.mark.spark
def test_files_of_others_stay_and_files_of_steps_do_not(spark: Any, tmp_path: Path):
    theirs = [tmp_path / "tasks" / name for name in ("notes.txt", "step-1.json", "answer.json")]
    names = ("step-00000007.json", "answer-00000007-00001.json")
    ours = [tmp_path / "tasks" / name for name in names]
    ours[0].parent.mkdir()
    for path in theirs + ours:
        path.write_text('{"kind": "end"}')

    with two_tasks(spark, tmp_path) as crew:
        for _ in range(3):
            assert len(crew.do({}, 2)) == 2
        during = list((tmp_path / "tasks").glob("*/*-????????*"))

    assert len(during) == 3  # the last step and its answers
    assert sorted((tmp_path / "tasks").iterdir()) == sorted(theirs)


@pytest.mark.spark
def test_tasks_end_with_their_block_even_if_it_fails(spark: Any, tmp_path: Path):
    with pytest.raises(KeyError), two_tasks(spark, tmp_path):
        raise KeyError

    assert spark.sparkContext.parallelize(range(2), 2).count() == 2


@pytest.mark.spark
def test_tasks_that_do_not_end_are_cancelled(spark: Any, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(standing, "_CLOSE_SECONDS", 0.5)

    def stuck() -> None:
        (tmp_path / f"{os.getpid()}").touch()
        time.sleep(600)

    with standing_tasks(spark, tmp_path, stuck, tasks=2) as crew:
        while len(list(tmp_path.glob("[0-9]*"))) < 2:
            time.sleep(0.05)

    assert not crew._thread.is_alive()
    assert "A Spark task failed" in str(crew._error)


DRIVER = """
import os, sys, time
from pathlib import Path
from medspark.launch.standing import standing_tasks
from medspark.spark.session import SparkConfig, spark_session

def make():
    class Worker:
        def do(self, step, part):
            time.sleep(step["seconds"])
            return {"pid": os.getpid()}
    return Worker()

with spark_session(SparkConfig(master="local[2]", log_level="OFF")) as spark:
    with standing_tasks(spark, Path(sys.argv[1]), make, tasks=2) as crew:
        print(*(each["pid"] for each in crew.do({"seconds": 0}, 2)), flush=True)
        crew.do({"seconds": float(sys.argv[2])}, 1)
        time.sleep(600)
"""


@pytest.mark.spark
@pytest.mark.slow
def test_no_process_is_left_if_the_driver_is_killed(tmp_path: Path):
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, tmp_path, "600"], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL, cwd=ROOT,
    )  # fmt: skip
    assert driver.stdout is not None
    tasks = [psutil.Process(int(word)) for word in driver.stdout.readline().split()]
    below = psutil.Process(driver.pid).children(recursive=True)
    assert len(tasks) == 2
    time.sleep(0.5)  # one task works, the other waits

    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs([*tasks, *below], timeout=60)

    assert alive == []
