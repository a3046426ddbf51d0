"""The measurements of gpu.py: a training step, an attack, the loader, and what a step waits for.

Ours trains as on any GPU: in bf16, channels-last, float32 without TF32. Each of the other sides
states its precision in its row's name. Batch norm is frozen on all sides, as our recipe has it, and
cuDNN's own choice of kernels is left alone (no benchmark mode).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "benchmarks"), str(TESTS / "shards")]

import attacks  # noqa: E402 - beside the benchmarks, which are no package
import step as steps  # noqa: E402
from array_shards import write_arrays  # noqa: E402
from timing import Result, by_turns  # noqa: E402

from medspark.data.batch import Batch, pinned, to_unit  # noqa: E402
from medspark.data.config import AugmentConfig, DataConfig  # noqa: E402
from medspark.data.prefetch import Prefetcher  # noqa: E402
from medspark.data.source import open_source  # noqa: E402
from medspark.train.config import TrainConfig  # noqa: E402
from medspark.train.world import join  # noqa: E402

Step = Callable[[], object]


@dataclass(frozen=True)
class Bench:
    """Where to measure and how much, and the file that gets a JSON line for each figure."""

    device: torch.device
    side: int
    batch: int
    turns: int
    block: int
    images: int
    rows: Path

    @property
    def on_gpu(self) -> bool:
        """Whether to measure on a GPU."""
        return self.device.type == "cuda"

    def tell(self, name: str, figure: object, **more: object) -> None:
        """Write one figure."""
        self._write({"name": name, "figure": figure, **more})

    def compare(self, name: str, result: Result) -> None:
        """Write one ratio with its goal."""
        self._write(result.row(name, command="tests/devices/gpu.sh"))

    def _write(self, row: dict[str, Any]) -> None:
        with self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def wait(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def block_of(self, step: Step) -> Step:
        """Return several steps, after which the device is done."""

        def work() -> None:
            for _ in range(self.block):
                step()
            self.wait()

        return work


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Compute float32 products and convolutions in TF32, or in full."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def measure_step(bench: Bench, name: str) -> None:
    """Compare our step with plain, adversarial and ART's steps."""
    place = {"device": bench.device, "batch": bench.batch}
    # The precision is named, so that a CPU goes through the same lines.
    ours = steps.ours(name, bench.side, TrainConfig(precision="bf16"), **place)
    _memory(bench, f"ours, bf16, {name}", ours)
    began = time.perf_counter()
    bench.block_of(ours)()
    seconds = (time.perf_counter() - began) / bench.block
    bench.tell(f"our step, images/s, {name}", bench.batch / seconds)
    plain = partial(steps.textbook, name, bench.side, attack=False, **place)
    attacked = partial(steps.textbook, name, bench.side, attack=True, **place)
    others: list[tuple[str, float, Callable[[], Step]]] = [
        ("plain, TF32", 1.0, plain),
        ("plain, bf16, channels-last, fused AdamW", 1.6, partial(same_precision, bench, name)),
        ("adversarial, TF32", 0.4, attacked),
    ]
    if importlib.util.find_spec("art") is not None:
        art = partial(steps.art, name, bench.side, **place)
        others.append(("ART's AdversarialTrainer, TF32", 0.15, art))
    else:
        bench.tell(f"ART, {name}", "not installed")
    for what, goal, make in others:
        with tf32(True):
            theirs = make()
            _memory(bench, f"{what}, {name}", theirs)
        pair = bench.block_of(ours), bench.block_of(_in_tf32(theirs))
        ratios = by_turns(*pair, turns=bench.turns)
        bench.compare(f"our step (bf16) ÷ {what}, {name}", Result(ratios, goal, False))
        del theirs, pair
        if bench.on_gpu:
            torch.cuda.empty_cache()


def _in_tf32(step: Step) -> Step:
    def work() -> object:
        with tf32(True):
            return step()

    return work


def same_precision(bench: Bench, name: str) -> Step:
    """Return the plain step in our precision and layout, with torch's fused AdamW."""
    model = steps.network(name).to(bench.device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    stored, labels = steps.images(bench.side, bench.batch)
    x = (stored.float() / 255).to(bench.device, memory_format=torch.channels_last)
    labels = labels.to(bench.device)

    def plain() -> None:
        optimiser.zero_grad()
        with torch.autocast(bench.device.type, dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimiser.step()

    return plain


def _memory(bench: Bench, name: str, step: Step) -> None:
    """Take three steps, and write the memory at their peak beyond what was there before."""
    if not bench.on_gpu:
        step()
        return
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    bench.tell(
        f"peak memory of a step, GB: {name}", (torch.cuda.max_memory_allocated() - before) / 1e9
    )


def measure_attack(bench: Bench) -> None:
    """Compare PGD-20 with foolbox's, both in TF32 and both in full float32."""
    if importlib.util.find_spec("foolbox") is None:
        bench.tell("foolbox", "not installed")
        return
    for allowed, kind in ((False, "float32"), (True, "TF32")):
        with tf32(allowed):
            result = attacks.against_foolbox(
                side=bench.side, device=bench.device, batch=bench.batch
            )
        bench.compare(f"foolbox's PGD-20 ÷ ours, {kind}, mobilenetv2_100", result)


def measure_loader(bench: Bench) -> None:
    """Measure images/s into the device's memory, and the share of training that waits for them."""
    with tempfile.TemporaryDirectory(prefix="medspark-gpu-") as folder:
        shape = bench.images, bench.side, bench.side, 1
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        split = pixels, np.arange(bench.images) % 2
        place = write_arrays(Path(folder) / "shards", {"train": split}, shards=4)
        source = open_source(place, DataConfig(augment=AugmentConfig(flip=0.5)))
        reader = source.training(global_batch=bench.batch, seed=0, rank=0, world=1)

        def batches(epoch: int) -> Iterator[Batch]:
            read = reader.batches(epoch)
            return map(pinned, read) if bench.on_gpu else read

        for epoch in range(3):  # the first one warms up the page cache
            began, images = time.perf_counter(), 0
            with Prefetcher(batches(epoch), depth=4) as ready:
                for batch in ready:
                    images += len(to_unit(batch.images, bench.device))
            bench.wait()
            rate = images / (time.perf_counter() - began)
        bench.tell("loader, images/s into the device's memory", rate)
        _data_wait(bench, batches)


def _data_wait(bench: Bench, batches: Callable[[int], Iterator[Batch]]) -> None:
    """Compare an epoch from the reader with as many steps on one batch that is there already.

    The host runs ahead of a GPU, so the time that it waits is not what the GPU waits.
    """
    name = steps.NETWORKS[1]
    engine = steps.engine_for(name, bench.side, TrainConfig(precision="bf16"), device=bench.device)
    kept = next(batches(0))
    for number in range(3):
        engine.step(kept, number)
    shares = []
    for turn in range(bench.turns):
        with Prefetcher(batches(turn + 1), depth=4) as ready:
            read = _seconds(bench, (partial(engine.step, batch, 0) for batch in ready))
        count = -(-bench.images // bench.batch)
        there = _seconds(bench, (partial(engine.step, kept, 0) for _ in range(count)))
        shares.append(max(0.0, 1 - there / read))
        engine.check()
    bench.compare(f"data-wait share, {name}", Result(tuple(shares), 0.02, False))


def _seconds(bench: Bench, work: Iterator[Step]) -> float:
    bench.wait()
    began = time.perf_counter()
    for step in work:
        step()
    bench.wait()
    return time.perf_counter() - began


def measure_waits(bench: Bench) -> None:
    """Count with the profiler for what the host waits within a step."""
    name = steps.NETWORKS[1]
    engine = steps.engine_for(name, bench.side, TrainConfig(precision="bf16"), device=bench.device)
    stored, labels = steps.images(bench.side, bench.batch)
    batch = Batch(stored, labels, np.arange(bench.batch), 1.0, bench.batch, 0, 0)
    batch = pinned(batch) if bench.on_gpu else batch
    for number in range(3):
        engine.step(batch, number)
    bench.wait()
    with torch.profiler.profile() as profile:
        for number in range(3, 6):
            with torch.profiler.record_function("a step"):
                engine.step(batch, number)
        bench.wait()
    # A CPU is never waited for: reads of single values go through the same lines there.
    heard = _waits_within(profile, "a step", read="Synchronize" if bench.on_gpu else "_scalar_")
    bench.tell("host waits in three steps", len(heard), which=heard, goal=0,
               reached=not heard, higher_is_better=False)  # fmt: skip
    totals = profile.key_averages().table(sort_by="cpu_time_total", row_limit=25)
    print(totals)


def _waits_within(profile: Any, name: str, *, read: str) -> list[str]:
    """Return the names of the events within ``name`` that wait: ``read``, or copies to the host."""
    events = profile.events()
    spans = [e.time_range for e in events if e.name == name and "CPU" in str(e.device_type)]

    def inside(event: Any) -> bool:
        return any(span.start <= event.time_range.start <= span.end for span in spans)

    return [e.name for e in events if any(w in e.name for w in (read, "DtoH")) and inside(e)]


def main() -> int:
    """Measure one section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here: try --device cpu --small.")
        return 2
    with join(alone=True) as world:  # sets torch up for a GPU as a rank does
        device = world.device if args.device == "cuda" else steps.CPU
        size = (32, 4, 1, 1, 16) if args.small else (224, 128, 3, 3, 4096)
        bench = Bench(device, *size, rows=args.rows)
        kind, _, name = args.section.partition("/")
        if kind == "step":
            measure_step(bench, name)
        else:
            {"attack": measure_attack, "loader": measure_loader, "waits": measure_waits}[kind](
                bench
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
