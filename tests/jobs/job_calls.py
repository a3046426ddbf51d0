"""Call every job on a folder, as fixtures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    pass

Call = Callable[..., int]
Files = dict[str, bytes]

TRAIN = "--shards {shards} --run_dir {target} --track.uri {store}"
JOBS = {
    "ingest": "--source {source} --samples {target} --privacy.key_file {key}",
    "predict": "--model {model} --source {source} --answers {target} --privacy.key_file {key}",
    "forget": "--samples {target} --patients {key}",
    "shard": "--samples {samples} --shards {target}",
    "train_at": TRAIN,
    "train_at, over what is there": f"{TRAIN} --overwrite",
    "train_at, going on": f"{TRAIN} --resume auto",
    "train_at, on built-in data": "--demo.folder {demo} --demo.count 20 --track.uri {store}",
    "distill": f"{TRAIN} --distill.teacher {{model}}",
    "prune": f"{TRAIN} --model {{model}}",
    "denoise": f"{TRAIN} --model {{model}} --judge.fpr 0.2",
    "prune_table": "--shards {shards} --folder {target} --models.x {model} --track.uri {store}",
    "federate": f"{TRAIN} --model.name resnet10t",
    "federate, over what is there": f"{TRAIN} --model.name resnet10t --overwrite",
    "federate, going on": f"{TRAIN} --model.name resnet10t --resume auto",
    "evaluate": "--model {model} --shards {shards} --folder {target} --track.uri {store}",
    "recalibrate": f"{TRAIN} --model {{model}} --images 12",
    "export_edge": "--model {model} --shards {shards} --folder {target} --track.uri {store}",
    "detect": "--model {model} --shards {shards} --folder {target} --track.uri {store} "
    "--fpr 0.2 --guard_folder {target}-guard",
    "scale_at": "--shards {shards} --folder {target} --grid.model resnet10t --repeats 1 "
    "--grid.processes 1 --train.batch_size 2 --model.name resnet10t --track.uri {store}",
    "backdoor_table": "--shards {shards} --folder {target} --model.name resnet10t "
    "--adversaries none badnets --clients.count 4 --track.uri {store}",
    "recipe_table": "--shards.x {shards} --folder {target} --model.name resnet10t "
    "--recipes.ema.train.ema 0.9 --track.uri {store}",
    "paper_table": "--datasets.x {shards} --folder {target} --models resnet10t --track.uri {store}",
}
DEMO = "demo/20-images-64px-seed-0"


def write_classes(folder: Path, *, images: int = 16) -> Path:
    random = np.random.default_rng(0)
    for number in range(images):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, and a key."""
    folder = tmp_path_factory.mktemp("home")
    write_classes(folder / "source")
    (folder / "key").write_text(hashlib.sha256(b"folders").hexdigest())
    (folder / "key").chmod(0o600)
    return folder


@pytest.fixture
def call(load_job: Callable[[str], ModuleType], home: Path, network: Path, write_shards) -> Call:
    """Return a function that runs a job on a target; ``more`` are further arguments."""
    shards = write_shards(rows=16, side=32)
    samples = home / "samples"
    samples.mkdir(exist_ok=True)
    (samples / "manifest.json").write_text(json.dumps(SAMPLES))

    def run(name: str, target: Path, *more: object) -> int:
        told = JOBS[name].format(
            source=home / "source",
            key=home / "key",
            samples=samples,
            shards=shards,
            model=network,
            target=target,
            demo=target.parent,
            store=f"sqlite:///{home}/mlflow.db",
        )
        words = f"{told} --output {home}/out/result.json".split()
        return int(load_job(name.split(",")[0]).main([*words, *map(str, more)]))

    return run


SAMPLES = {
    "schema_version": 2, "generation": "g", "previous": None, "digest": "d", "counts": {},
    "rendering": {}, "key_check": "k", "parts": [], "ledger": [], "quarantine": [],
}  # fmt: skip


def files(folder: Path) -> Files:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}
