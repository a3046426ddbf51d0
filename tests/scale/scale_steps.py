"""The steps of one size: make files, ingest, ingest again with 1 % new, cut, plan, train."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import memory_watch
from made_archive import SIDE, write

ROOT = Path(__file__).resolve().parents[2]
# Driver and executor are processes of their own, so that their memories can be told apart.
CORES = os.cpu_count() or 1
MASTER = f"local-cluster[1,{CORES},2048]"
# A full collection whenever the driver is quiet: what it holds afterwards, it needs.
JAVA = (
    "-XX:TieredStopAtLevel=1 -XX:+UseG1GC -XX:G1PeriodicGCInterval=2000 "
    "-XX:-G1PeriodicGCInvokesConcurrent"
)
SMALL, SMALL_TURNS = 10_000, 3
TRAINING = [
    *("--model.name", "test_resnet", "--train.epochs", "1", "--train.batch_size", "256"),
    *("--train.validation_images", "256", "--train.validation_steps", "1", "--data.verify", "size"),
    *("--train.monitor.action", "off", "--evaluate.attacks", "fgsm", "--evaluate.images", "256"),
    *("--evaluate.sanity_images", "0", "--launch.processes", str(CORES)),
    *("--spark.master", f"local[{CORES}]", "--track.system_metrics", "false"),
]


class Size:
    """All steps of one size, each done once and kept in ``steps.json``."""

    def __init__(self, folder: Path, files: int, *, keep: bool) -> None:
        self.files, self.new = files, max(1, files // 100)
        self.folder, self._keep = folder / str(files), keep
        self.folder.mkdir(parents=True, exist_ok=True)
        self._record = self.folder / "steps.json"
        done = json.loads(self._record.read_text()) if self._record.exists() else {}
        self.done: dict[str, dict[str, Any]] = done

    def run(self, *, train: bool) -> dict[str, dict[str, Any]]:
        """Do what is missing, and return what every step measured."""
        self._step("make", self._make)
        self._step("ingest", self._first)
        self._step("again", self._again)
        self._step("shard", self._shard)
        self._step("plan", self._plan)
        if train:
            self._step("train", self._train)
        if not self._keep:
            for name in ("shards", "run"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.done

    def _step(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        if name not in self.done:
            self.done[name] = work()
            self._record.write_text(json.dumps(self.done, indent=1) + "\n")
            seconds = self.done[name].get("seconds", 0.0)
            print(f"{self.files:>9} files, {name:7} {seconds:8.1f} s", flush=True)

    def _make(self) -> dict[str, Any]:
        size = write(self.folder / "archive", 0, self.files, processes=CORES)
        return {"bytes": size}

    def _first(self) -> dict[str, Any]:
        """Ingest; small sizes several times, since their start-up varies by more than they take."""
        turns = []
        for _ in range(SMALL_TURNS if self.files <= SMALL else 1):
            shutil.rmtree(self.folder / "samples", ignore_errors=True)
            turns.append(self._ingest("ingest"))
        turns.sort(key=lambda turn: float(turn["seconds"]))
        return turns[len(turns) // 2]

    def _again(self) -> dict[str, Any]:
        archive, samples = self.folder / "archive", self.folder / "samples"
        write(archive, self.files, self.files + self.new, processes=1)
        done = self._ingest("again")
        if not self._keep:
            shutil.rmtree(archive)
        return done | {"manifest_bytes": (samples / "manifest.json").stat().st_size}

    def _ingest(self, name: str) -> dict[str, Any]:
        key = self.folder / "key"
        key.write_text(hashlib.sha256(b"scale").hexdigest() + "\n")
        key.chmod(0o600)
        done = self._submit(
            name, "ingest", "--source", self.folder / "archive",
            "--samples", self.folder / "samples", "--image_size", SIDE,
            "--privacy.key_file", key, "--privacy.quarantine_file", self.folder / "private.csv",
        )  # fmt: skip
        result = json.loads((self.folder / f"{name}.json").read_text())
        wanted = self.files + (self.new if name == "again" else 0)
        assert result["samples"] == result["files_seen"] == wanted, result
        return done | {"new": result["new"], "unchanged": result["unchanged"]}

    def _shard(self) -> dict[str, Any]:
        samples = self.folder / "samples"
        done = self._submit(
            "shard", "shard", "--samples", samples, "--shards", self.folder / "shards"
        )
        if not self._keep:
            shutil.rmtree(samples)
        return done

    def _plan(self) -> dict[str, Any]:
        """Open the shards as a rank does, in a process of its own."""
        command = [sys.executable, Path(__file__).with_name("open_shards.py")]
        done = self._watched("plan", [*command, self.folder / "shards"])
        said = json.loads((self.folder / "plan.log").read_text().splitlines()[-1])
        return done | said

    def _train(self) -> dict[str, Any]:
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        done = self._watched(
            "train",
            [
                *self._spark_submit("train", f"local[{CORES}]"), "jobs/train_at.py",
                "--shards", self.folder / "shards", "--run_dir", self.folder / "run", *TRAINING,
                "--track.uri", f"sqlite:///{self.folder}/mlflow.db",
                "--output", self.folder / "train.json",
            ],
        )  # fmt: skip
        result = json.loads((self.folder / "train.json").read_text())
        chosen = ("train_images", "images_per_second", "data_wait_share")
        return done | {name: result[name] for name in chosen if name in result}

    def _submit(self, name: str, job: str, *words: object) -> dict[str, Any]:
        output = ("--output", self.folder / f"{name}.json")
        done = self._watched(
            name, [*self._spark_submit(name, MASTER), f"jobs/{job}.py", *words, *output]
        )
        return done | {"driver_heap_mb": memory_watch.live_heap(self.folder / f"{name}.gc")}

    def _spark_submit(self, name: str, master: str) -> list[object]:
        gc = self.folder / f"{name}.gc"
        gc.unlink(missing_ok=True)
        return [
            "spark-submit", "--master", master, "--driver-java-options",
            f"{JAVA} -Xlog:gc:file={gc}:time:filecount=0", "--conf", "spark.executor.memory=2g",
        ]  # fmt: skip

    def _watched(self, name: str, command: list[object]) -> dict[str, Any]:
        environment = os.environ | {
            "SPARK_CONF_DIR": str(ROOT / "conf"),
            "PYSPARK_PYTHON": sys.executable,
            "HOME": str(self.folder),
            "SPARK_LOCAL_IP": "127.0.0.1",
        }
        return memory_watch.run(
            command, log=self.folder / f"{name}.log", environment=environment, cwd=ROOT
        )
