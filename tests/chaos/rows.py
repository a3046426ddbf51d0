"""The fault matrix: each row disturbs a training and checks that it recovers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from lab import (
    EVERY,
    STEPS,
    Lab,
    Run,
    Verdict,
    kill,
    leftovers,
    make_shards,
    mlflow_server,
)
from mlflow.tracking import MlflowClient
from small_disk import small_disk

TWO = ("--launch.processes", 2)
AGAIN = (*TWO, "--launch.max_restarts", 2)
MIDDLE = STEPS // 2 + 2


def killed_ranks(lab: Lab) -> Iterator[Verdict]:
    """C1: kill -9 of rank 0, rank 1 and both; mid-run, during a checkpoint, at the last step."""
    for name, ranks, when in (
        ("rank-0-mid", (0,), "mid"),
        ("rank-1-mid", (1,), "mid"),
        ("both-mid", (0, 1), "mid"),
        ("rank-0-checkpoint", (0,), "checkpoint"),
        ("rank-0-last", (0,), "last"),
        ("rank-1-last", (1,), "last"),
    ):
        run = Run(lab, f"c1-{name}", *AGAIN)
        run.wait_for_step({"mid": MIDDLE, "checkpoint": EVERY, "last": STEPS - 1}[when])
        if when == "checkpoint":
            scratch = run.run_dir / "checkpoints"
            run.wait_for(lambda s=scratch: any(s.glob(".step-*")), "a checkpoint")
        killed = [kill(run.rank(rank).pid) for rank in ranks]
        verdict = lab.judge(run, Verdict(f"C1 {name}"), redone=EVERY)
        if not verdict.problems:
            verdict.limit("seconds to recover", run.recovery_seconds(killed[0]), 25)
        yield verdict


def killed_agent(lab: Lab) -> Iterator[Verdict]:
    """C2: kill -9 of a torchrun agent; torch's exit barrier of 300 s must not be paid."""
    run = Run(lab, "c2", *AGAIN)
    run.wait_for_step(MIDDLE)
    at = kill(run.above(1, "torch.distributed.run").pid)
    run.wait_for(lambda: run.attempt > 1, "a second attempt")
    detected = time.time() * 1000 - at
    verdict = lab.judge(run, Verdict("C2 agent"), redone=EVERY)
    verdict.limit("seconds to notice", detected / 1000, 15 + 12)
    verdict.limit("seconds more than unbroken", run.seconds - lab.unbroken.seconds, 40)
    yield verdict


def killed_spark(lab: Lab) -> Iterator[Verdict]:
    """C3: kill -9 of the Python worker of Spark above a rank, and of the executor's JVM."""
    for name, part in (("worker", "pyspark.daemon"), ("executor", "CoarseGrainedExecutorBackend")):
        run = Run(lab, f"c3-{name}", *AGAIN)
        run.wait_for_step(MIDDLE)
        at = kill(run.above(1, part).pid)
        verdict = lab.judge(run, Verdict(f"C3 {name}"), redone=EVERY)
        if not verdict.problems:
            verdict.limit("seconds to recover", run.recovery_seconds(at), 30)
        yield verdict


def lost_node(lab: Lab) -> Iterator[Verdict]:
    """C4: kill -9 of a worker, not replaced: the run goes on with one rank."""
    run = Run(lab, "c4", *AGAIN)
    run.wait_for_step(MIDDLE)
    at = time.time() * 1000
    lab.cluster.kill_worker(1)
    verdict = lab.judge(run, Verdict("C4 node"), redone=EVERY, exact=False)
    if not verdict.problems:
        verdict.limit("seconds to recover", run.recovery_seconds(at), 40)
        verdict.expect(run.result["world_size"] == 1, "the world did not shrink")
    lab.cluster.start_worker(1)
    lab.cluster.wait_for_workers(2)
    yield verdict


def node_comes_back(lab: Lab) -> Iterator[Verdict]:
    """C5: as C4, then the worker comes back: the run grows at its next checkpoint."""
    run = Run(lab, "c5", *AGAIN, "--train.epochs", 12)
    run.wait_for_step(EVERY + 1)
    lab.cluster.kill_worker(1)
    run.wait_for_step(EVERY + 2, attempt=2)
    lab.cluster.start_worker(1)
    verdict = Verdict("C5 node back")
    status = run.finish(seconds=400)
    verdict.expect(status == 0, f"status {status}: {run.errors[-600:]}")
    if status == 0:
        verdict.expect(run.result["world_size"] == 2, "the world did not grow again")
        verdict.figures["attempts"] = run.result["launch"]["attempts"]
        steps = {record.step for record in run.records()}
        verdict.expect(len(steps) == 12 * STEPS // 4, "steps are missing")
    verdict.expect(not leftovers(), "processes are left over")
    yield verdict


def killed_driver(lab: Lab) -> Iterator[Verdict]:
    """C6: kill -9 of the driver's Python, then of its JVM; the job is submitted again."""
    for name in ("python", "jvm"):
        run = Run(lab, f"c6-{name}", *TWO)
        run.wait_for_step(MIDDLE)
        # spark-submit's JVM is the process that was started; Python is its child.
        target = _driver_python(run.process.pid) if name == "python" else run.process.pid
        ranks = [run.rank(rank).pid for rank in (0, 1)]
        kill(target)
        verdict = Verdict(f"C6 {name}")
        verdict.expect(not leftovers(seconds=5), "ranks outlived the driver by 5 s")
        run.process.wait(60)
        submitted = time.time() * 1000
        verdict.figures["ranks"] = len(ranks)
        again = Run(lab, f"c6-{name}", *TWO, "--resume", "auto", folder=run.folder)
        lab.judge(again, verdict, redone=EVERY)
        if not verdict.problems:
            verdict.limit("seconds to resume", again.recovery_seconds(submitted), 30)
        yield verdict


def killed_master(lab: Lab) -> Iterator[Verdict]:
    """C7: kill -9 of the master, then its restart: training never stops."""
    run = Run(lab, "c7", *TWO)
    run.wait_for_step(EVERY)
    lab.cluster.kill_master()
    time.sleep(2)
    lab.cluster.start_master()
    verdict = lab.judge(run, Verdict("C7 master"), redone=0)
    verdict.expect(run.attempt == 1, "the ranks were started again")
    lab.cluster.wait_for_workers(2)
    yield verdict


def straggler(lab: Lab) -> Iterator[Verdict]:
    """C8: a rank is stopped for 8 s, less than the time-out: nothing is started again."""
    run = Run(lab, "c8", *TWO)
    run.wait_for_step(MIDDLE)
    pid = run.rank(1).pid
    kill(pid, signal.SIGSTOP)
    time.sleep(8)
    kill(pid, signal.SIGCONT)
    verdict = lab.judge(run, Verdict("C8 straggler"), redone=0)
    verdict.expect(run.attempt == 1, "the ranks were started again")
    speeds = [r.metrics["images_per_second"] for r in run.records()]
    ratio = float(np.median(speeds) / min(speeds))
    verdict.figures["usual speed to slowest"] = round(ratio, 1)
    verdict.expect(ratio > 3, "the journal does not show the straggler")
    yield verdict


def frozen_rank(lab: Lab) -> Iterator[Verdict]:
    """C9: rank 0 is stopped, and continued after the next attempt has committed."""
    run = Run(lab, "c9", *AGAIN)
    run.wait_for_step(MIDDLE)
    pid = run.rank(0).pid
    at = kill(pid, signal.SIGSTOP)
    run.wait_for(lambda: run.attempt > 1, "a second attempt")
    verdict = Verdict("C9 frozen")
    verdict.limit("seconds to notice", (time.time() * 1000 - at) / 1000, 20 + 3 + 12)
    run.wait_for_step(MIDDLE + EVERY, attempt=2)
    kill(pid, signal.SIGCONT)
    lab.judge(run, verdict, redone=EVERY)
    yield verdict


def full_disk(lab: Lab) -> Iterator[Verdict]:
    """C11: the checkpoints' disk is full: training goes on, and nothing partial is visible."""
    size = _checkpoint_bytes(lab.unbroken)
    folder = lab.folder / "c11" / "run" / "checkpoints"
    with small_disk(folder, int(1.5 * size)) as mounted:
        verdict = Verdict("C11 disk")
        if not mounted:
            verdict.figures["skipped"] = "this machine does not let us mount a small disk"
            yield verdict
            return
        run = Run(lab, "c11", *TWO)
        lab.judge(run, verdict, redone=0)
        whole = [path for path in folder.glob("step-*") if (path / "state.json").exists()]
        verdict.expect(len(whole) == len(list(folder.glob("step-*"))) >= 1, "a partial checkpoint")
        log = (run.run_dir / "attempts" / "0001" / "rank-0.log").read_text()
        verdict.expect("no checkpoint at step" in log, "the full disk was not logged")
        yield verdict


def damaged_checkpoint(lab: Lab) -> Iterator[Verdict]:
    """C12: the newest checkpoint is truncated, flipped, gone or mixed: the one before is used."""
    crashed = Run(lab, "c12", *TWO)
    crashed.wait_for_step(MIDDLE)
    kill(crashed.process.pid)
    crashed.process.wait(60)
    leftovers()
    for name, damage in _DAMAGES.items():
        folder = lab.folder / f"c12-{name}"
        shutil.copytree(crashed.folder, folder)
        _relocate(folder, crashed.folder)
        damage(sorted((folder / "run" / "checkpoints").glob("step-*")))
        again = Run(lab, f"c12-{name}", *TWO, "--resume", "auto", folder=folder)
        yield lab.judge(again, Verdict(f"C12 {name}"), redone=2 * EVERY)


def odd_worlds(lab: Lab) -> Iterator[Verdict]:
    """C17: 8 row groups over 3 ranks, 5 over 4, 1 over 2: equal steps, no hang."""
    for groups, ranks in ((8, 3), (5, 4), (1, 2)):
        shards = make_shards(
            lab.folder / f"shards-{groups}", rows_per_group=-(-320 // groups), shards=1
        )
        run = Run(
            lab,
            f"c17-{groups}-{ranks}",
            # The cluster has fewer slots than ranks, so the ranks are processes of the driver.
            *("--spark.master", f"local[{ranks}]", "--launch.processes", ranks),
            *("--shards", shards),
            *("--launch.timeout_seconds", 60),
        )
        verdict = Verdict(f"C17 {groups} groups over {ranks} ranks")
        lab.judge(run, verdict, redone=0, exact=False)
        yield verdict


def server_away(lab: Lab) -> Iterator[Verdict]:
    """C18: the MLflow server is down for a while, and for the rest of the run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    for name in ("a-while", "for-ever"):
        folder = lab.folder / f"c18-{name}"
        folder.mkdir()
        with mlflow_server(folder, port) as server:
            options = (
                "--track.uri",
                uri,
                "--track.patience_seconds",
                60 if name == "a-while" else 1,
            )
            run = Run(lab, f"c18-{name}", *TWO, *options)
            run.wait_for_step(EVERY)
            os.killpg(server.pid, signal.SIGKILL)
            if name == "a-while":
                run.wait_for_step(STEPS - EVERY)
        verdict = Verdict(f"C18 {name}")
        if name == "for-ever":
            verdict.expect(run.finish() == 0, f"the job failed: {run.errors[-600:]}")
        with mlflow_server(folder, port):
            if name == "for-ever":
                publish = [sys.executable, "-m", "medspark.track", "--uri", uri, str(run.run_dir)]
                verdict.expect(subprocess.run(publish).returncode == 0, "not published")
            else:
                verdict.expect(run.finish() == 0, f"the job failed: {run.errors[-600:]}")
            run_id = json.loads((run.run_dir / "run.json").read_text())["run_id"]
            client = MlflowClient(uri)
            history = client.get_metric_history(run_id, "loss")
            verdict.expect(len(history) == STEPS, f"{len(history)} losses instead of {STEPS}")
            verdict.expect(client.get_run(run_id).info.status == "FINISHED", "not finished")
        speed = run.result["images_per_second"] / lab.unbroken.result["images_per_second"]
        verdict.figures["speed against unbroken"] = round(speed, 2)
        yield verdict


ROWS: dict[str, Callable[[Lab], Iterator[Verdict]]] = {
    "C1": killed_ranks,
    "C2": killed_agent,
    "C3": killed_spark,
    "C4": lost_node,
    "C5": node_comes_back,
    "C6": killed_driver,
    "C7": killed_master,
    "C8": straggler,
    "C9": frozen_rank,
    "C11": full_disk,
    "C12": damaged_checkpoint,
    "C17": odd_worlds,
    "C18": server_away,
}


def _driver_python(jvm: int) -> int:
    for child in psutil.Process(jvm).children():
        with suppress(psutil.Error):  # one that has just ended
            if "train_at.py" in " ".join(child.cmdline()):
                return int(child.pid)
    raise RuntimeError("the driver has no Python")


def _checkpoint_bytes(run: Run) -> int:
    newest = max((run.run_dir / "checkpoints").glob("step-*"))
    return sum(path.stat().st_size for path in newest.iterdir())


def _relocate(folder: Path, old: Path) -> None:
    """Let the copied run's record point to the copied MLflow database."""
    state = folder / "run" / "run.json"
    state.write_text(state.read_text().replace(f"{old}/mlflow.db", f"{folder}/mlflow.db"))


def _truncate(checkpoints: list[Path]) -> None:
    tensors = checkpoints[-1] / "state.safetensors"
    os.truncate(tensors, tensors.stat().st_size // 2)


def _flip(checkpoints: list[Path]) -> None:
    tensors = checkpoints[-1] / "state.safetensors"
    data = bytearray(tensors.read_bytes())
    data[len(data) // 2] ^= 1
    tensors.write_bytes(data)


def _delete(checkpoints: list[Path]) -> None:
    (checkpoints[-1] / "state.safetensors").unlink()


def _mix(checkpoints: list[Path]) -> None:
    shutil.copy(checkpoints[-2] / "state.json", checkpoints[-1] / "state.json")


_DAMAGES: dict[str, Callable[[list[Path]], None]] = {
    "truncated": _truncate,
    "flipped": _flip,
    "deleted": _delete,
    "mixed": _mix,
}
