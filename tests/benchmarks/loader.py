"""Reading shuffled epochs of 64 x 64 images as float batches of 32, by turns with the peers.

Every side reads the same 4,096 images from the local disk into (B, 1, 64, 64) floats in [0, 1]
in this process, for three epochs, as a training would. Each peer stores them in the form that
suits it best: LitData raw values,
WebDataset and the image folder PNG files. LitData and WebDataset take part where installed:
pip install litdata webdataset (neither is a dependency).
"""

from __future__ import annotations

import importlib.util
import io
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from array_shards import write_arrays
from PIL import Image
from timing import Result, by_turns
from torch import Tensor

from medspark.attacks.threat import ThreatModel
from medspark.data.batch import to_unit
from medspark.data.config import AugmentConfig, DataConfig
from medspark.data.prefetch import Prefetcher
from medspark.data.source import Source, open_source
from medspark.models.backbones import build
from medspark.models.classifier import freeze_batch_norm
from medspark.models.config import ModelConfig
from medspark.train.config import TrainConfig
from medspark.train.engine import Engine
from medspark.train.objective import CrossEntropy
from medspark.train.world import World

ROWS, SIDE, BATCH, EPOCHS = 4096, 64, 32, 3
CPU = torch.device("cpu")


@cache
def folder() -> Path:
    """Return a scratch folder that lasts as long as the process."""
    keep = tempfile.TemporaryDirectory(prefix="medspark-bench-")
    _KEPT.append(keep)
    return Path(keep.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@cache
def pixels() -> np.ndarray:
    """Return the images: smooth blobs with noise, which PNG compresses about as it does X-rays."""
    generator = np.random.default_rng(0)
    coarse = generator.uniform(40, 200, (ROWS, 8, 8)).astype(np.float32)
    smooth = coarse.repeat(8, axis=1).repeat(8, axis=2)
    noisy = smooth + generator.normal(0, 6, smooth.shape).astype(np.float32)
    return noisy.clip(0, 255).astype(np.uint8)[..., None]


@cache
def source() -> Source:
    """Return the images as shards of 1,024 rows."""
    split = pixels(), np.arange(ROWS) % 2
    place = write_arrays(folder() / "shards", {"train": split}, shards=ROWS // 1024)
    return open_source(place, DataConfig(augment=AugmentConfig(flip=0)))


def _check(images: Tensor) -> int:
    assert images.shape[1:] == (1, SIDE, SIDE)
    assert images.dtype == torch.float32
    return len(images)


def native() -> int:
    """Read the epochs with our reader."""
    reader = source().training(global_batch=BATCH, seed=0, rank=0, world=1)
    return sum(
        _check(to_unit(batch.images, CPU))
        for epoch in range(EPOCHS)
        for batch in reader.batches(epoch)
    )


def petastorm() -> int:
    """Read the epochs as Petastorm documents it: batch reader, batched shuffling loader."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from petastorm import TransformSpec, make_batch_reader
        from petastorm.pytorch import BatchedDataLoader

        def decode(frame):  # type: ignore[no-untyped-def]
            frame["pixels"] = [np.frombuffer(value, dtype=np.uint8) for value in frame["pixels"]]
            return frame

        spec = TransformSpec(
            decode,
            edit_fields=[("pixels", np.uint8, (SIDE * SIDE,), False)],
            selected_fields=["pixels", "label"],
        )
        urls = [path.as_uri() for path in sorted((folder() / "shards/data").glob("*.parquet"))]
        reader = make_batch_reader(
            urls,
            schema_fields=["pixels", "label"],
            transform_spec=spec,
            shuffle_row_groups=True,
            num_epochs=EPOCHS,
            workers_count=2,
        )
        with BatchedDataLoader(reader, batch_size=BATCH, shuffling_queue_capacity=512) as loader:
            return sum(
                _check(batch["pixels"].float().div_(255).view(-1, 1, SIDE, SIDE))
                for batch in loader
            )


@cache
def _png(row: int) -> bytes:
    held = io.BytesIO()
    Image.fromarray(pixels()[row, :, :, 0]).save(held, "png")
    return held.getvalue()


class _Folder(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """PNG files, opened one by one."""

    def __init__(self) -> None:
        self.place = folder() / "png"
        if not self.place.exists():
            self.place.mkdir()
            for row in range(ROWS):
                (self.place / f"{row:05d}.png").write_bytes(_png(row))

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        image = np.array(Image.open(self.place / f"{row:05d}.png"))
        return torch.from_numpy(image)[None].float().div_(255), row % 2


def image_folder() -> int:
    """Read the epochs with torch's DataLoader from PNG files."""
    loader = torch.utils.data.DataLoader(_Folder(), batch_size=BATCH, shuffle=True)
    return sum(_check(images) for _ in range(EPOCHS) for images, _ in loader)


def webdataset() -> int:
    """Read the epochs with WebDataset from a tar of PNG files."""
    import webdataset as wds

    path = folder() / "images.tar"
    if not path.exists():
        with tarfile.open(path, "w") as tar:
            for row in range(ROWS):
                for suffix, content in (("png", _png(row)), ("cls", str(row % 2).encode())):
                    info = tarfile.TarInfo(f"{row:05d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    dataset = (
        wds.WebDataset(str(path), shardshuffle=False)
        .shuffle(512)
        .decode("l8")
        .to_tuple("png", "cls")
        .batched(BATCH)
    )
    return sum(
        _check(torch.as_tensor(np.stack(images)).view(-1, 1, SIDE, SIDE).float().div_(255))
        for _ in range(EPOCHS)
        for images, _ in dataset
    )


def _raw(row: int) -> dict[str, object]:
    return {"image": torch.from_numpy(pixels()[row, :, :, 0].copy())[None], "label": row % 2}


def litdata() -> int:
    """Read the epochs with LitData from chunks of raw values."""
    import litdata as ld

    place = folder() / "litdata"
    if not place.exists():
        from litdata.streaming.writer import BinaryWriter

        place.mkdir()
        writer = BinaryWriter(str(place), chunk_bytes="8MB")
        for row in range(ROWS):
            writer[row] = _raw(row)
        writer.done()
        writer.merge()
    dataset = ld.StreamingDataset(str(place), shuffle=True, drop_last=False)
    loader = ld.StreamingDataLoader(dataset, batch_size=BATCH)
    return sum(_check(batch["image"].float().div_(255)) for _ in range(EPOCHS) for batch in loader)


def _speed_up(theirs: Callable[[], int]) -> tuple[float, ...]:
    source()
    return tuple(1 / ratio for ratio in by_turns(native, theirs, turns=5))


def against_petastorm() -> Result:
    """Return how many times faster the native reader is than Petastorm."""
    return Result(_speed_up(petastorm), goal=10, higher_is_better=True)


def against_best_peer() -> Result:
    """Return how many times faster the native reader is than the fastest peer that is installed."""
    peers: dict[str, Callable[[], int]] = {"torch": image_folder}
    if importlib.util.find_spec("litdata") is not None:
        peers["litdata"] = litdata
    if importlib.util.find_spec("webdataset") is not None:
        peers["webdataset"] = webdataset
    results = {name: _speed_up(read) for name, read in peers.items()}
    best = min(results, key=lambda name: sorted(results[name])[len(results[name]) // 2])
    print("times faster than:", {k: round(sorted(v)[len(v) // 2], 1) for k, v in results.items()})
    return Result(results[best], goal=2, higher_is_better=True)


def data_wait(network: str = "mobilenetv2_100", steps: int = 15) -> Result:
    """Return the share of training time that is spent waiting for data."""
    reader = source().training(global_batch=BATCH, seed=0, rank=0, world=1)
    model = build(ModelConfig(name=network), num_classes=2, channels=1)
    freeze_batch_norm(model)
    engine = Engine(
        model,
        config=TrainConfig(),
        threat=ThreatModel(),
        objective=CrossEntropy(),
        image_shape=(1, SIDE, SIDE),
        total_steps=1000,
        seed=0,
        world=World(0, 0, 1, CPU),
    )
    return Result(tuple(_waits(reader.batches(0), engine, steps)), 0.02, higher_is_better=False)


def _waits(batches: Iterator[object], engine: Engine, steps: int) -> Iterator[float]:
    import time

    with Prefetcher(batches, depth=4) as ready:
        began, waited = time.perf_counter(), 0.0
        for number, batch in enumerate(ready):
            engine.step(batch, number)  # type: ignore[arg-type]
            if number % 5 == 4:
                now = time.perf_counter()
                if number > 4:
                    yield (ready.waited - waited) / (now - began)
                began, waited = now, ready.waited
            if number == steps:
                return


BENCHMARKS: dict[str, Callable[[], Result]] = {
    "loader_vs_petastorm": against_petastorm,
    "loader_vs_best_peer": against_best_peer,
    "data_wait_share": partial(data_wait, steps=30),
}
