"""The fault matrix of ingest: killed, on a full disk, with damaged and with poisoned files."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from lab import Lab, Verdict, kill, make_shards
from poison import write_bombs
from small_disk import small_disk

from medspark.images.phantom import ArchiveSummary, PhantomConfig, write_archive
from medspark.ingest.sample_set import SampleSet

FIRST, ALL = 150, 600  # files of the existing dataset and of the new one


class Ingest:
    """One ingest on the cluster of ``source`` into ``samples``."""

    def __init__(self, lab: Lab, source: Path, samples: Path) -> None:
        self.result_path = samples.with_suffix(".json")
        key = lab.folder / "key"
        key.touch(0o600)
        key.write_text(hashlib.sha256(b"chaos").hexdigest())
        self.process = lab.cluster.submit(
            *("ingest.py", "--source", source, "--labels", source / "labels.csv"),
            *("--samples", samples, "--image_size", 32, "--privacy.key_file", key),
            *("--privacy.quarantine_file", samples.with_suffix(".csv")),
            *("--output", self.result_path),
        )
        lab.running.append(self.process)

    def wait_for(self, truth: Callable[[], Any], what: str, *, seconds: float = 200) -> Any:
        """Wait until ``truth`` returns something true, and return it."""
        deadline = time.monotonic() + seconds
        while not (found := truth()):
            if self.process.poll() is not None:
                raise RuntimeError(f"the ingest ended before {what}: {self.process.stdout.read()}")
            if time.monotonic() > deadline:
                raise TimeoutError(what)
            time.sleep(0.002)
        return found

    def finish(self) -> int:
        """Wait for the end and return the exit status."""
        self.said = "".join(self.process.communicate(timeout=400)[::-1])
        return int(self.process.returncode)

    @property
    def result(self) -> dict[str, Any]:
        """The result document."""
        return dict(json.loads(self.result_path.read_text()))


class Reader(threading.Thread):
    """Reads the dataset repeatedly, and notes every incomplete one."""

    def __init__(self, samples: Path) -> None:
        super().__init__(daemon=True)
        self.samples, self.stop = samples, threading.Event()
        self.digests: set[str] = set()
        self.torn: list[str] = []
        before = SampleSet(str(samples)).manifest()
        self.parts = {part.path for part in before.parts} if before else set()
        self.start()

    def run(self) -> None:
        """Read until stopped."""
        while not self.stop.wait(0.02):
            manifest = SampleSet(str(self.samples)).manifest()
            if manifest is None:
                self.torn.append("no manifest")
                continue
            self.digests.add(manifest.digest)
            for part in manifest.parts:
                path = self.samples / part.path
                if not path.exists() or path.stat().st_size != part.bytes:
                    self.torn.append(part.path)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.join()


def killed_ingest(lab: Lab) -> Iterator[Verdict]:
    """C13: kill -9 of an executor, and of the driver at five moments, while a reader reads."""
    source = lab.folder / "archive"
    write_archive(source, PhantomConfig(count=FIRST, size=96))
    start = lab.folder / "c13-start"
    first = Ingest(lab, source, start)
    if first.finish() != 0:
        raise RuntimeError(f"the first ingest failed: {first.said[-600:]}")
    key = write_archive(source, PhantomConfig(count=ALL, size=96))
    unbroken = _copy(start, lab.folder / "c13-unbroken")
    whole = Ingest(lab, source, unbroken)
    if whole.finish() != 0:
        raise RuntimeError(f"the unbroken ingest failed: {whole.said[-600:]}")
    old = _digest(start)
    digests = {old, _digest(unbroken)}
    yield _killed_executor(lab, source, _copy(start, lab.folder / "c13-executor"), key, digests)
    for name, moment in _MOMENTS.items():
        samples = _copy(start, lab.folder / f"c13-{name}")
        verdict = Verdict(f"C13 driver {name}")
        with Reader(samples) as reader:
            job = Ingest(lab, source, samples)
            job.wait_for(lambda m=moment, s=samples: m(s, old), name)
            os.killpg(job.process.pid, 9)
            job.process.wait(60)
            again = Ingest(lab, source, samples)
            verdict.expect(again.finish() == 0, f"the next ingest failed: {_tail(again)}")
        if not verdict.problems:
            _judge(verdict, samples, key, again.result, digests, reader)
        yield verdict


# When to kill the driver, by the folder of the samples and the digest before.
_MOMENTS: dict[str, Callable[[Path, str], bool]] = {
    "before-write": lambda samples, _: (samples / "staging" / "files").exists(),
    "mid-write": lambda samples, _: len(_generations(samples)) > 1,
    "ledger": lambda samples, _: len(list((samples / "ledger").iterdir())) > 1,
    "before-commit": lambda samples, _: len(list((samples / "quarantine").iterdir())) > 1,
    "after-commit": lambda samples, old: _digest(samples) != old,
}


def _killed_executor(
    lab: Lab, source: Path, samples: Path, key: ArchiveSummary, digests: set[str]
) -> Verdict:
    verdict = Verdict("C13 executor")
    with Reader(samples) as reader:
        job = Ingest(lab, source, samples)
        job.wait_for(lambda: len(_generations(samples)) > 1, "writing")
        executor = job.wait_for(_executor, "an executor")
        kill(executor.pid)
        verdict.expect(job.finish() == 0, f"the ingest failed: {_tail(job)}")
    if not verdict.problems:
        _judge(verdict, samples, key, job.result, digests, reader)
    return verdict


def _judge(
    verdict: Verdict,
    samples: Path,
    key: ArchiveSummary,
    result: dict[str, Any],
    digests: set[str],
    reader: Reader,
) -> None:
    manifest = SampleSet(str(samples)).manifest()
    assert manifest is not None
    rows = [row for file in manifest.ledger for row in pq.read_table(samples / file).to_pylist()]
    live = [(row["part"], row["row"]) for row in rows if row["outcome"] == "sample"]
    verdict.figures |= {"samples": len(live), "reads": len(reader.digests)}
    verdict.expect(len(live) == len(set(live)) == key.images, f"{len(live)} of {key.images} rows")
    verdict.expect(result["files_seen"] == key.files, f"{result['files_seen']} of {key.files}")
    verdict.expect(manifest.digest in digests, "the samples are not those of the unbroken ingest")
    verdict.expect(reader.digests <= digests, "a reader saw samples that nobody committed")
    verdict.expect(not reader.torn, f"a reader saw half a dataset: {reader.torn[:3]}")
    named = {part.path for part in manifest.parts}
    there = {str(path.relative_to(samples)) for path in (samples / "data").rglob("*.parquet")}
    # The files of the previous manifest stay for readers that still use them.
    left = there - named - reader.parts
    verdict.expect(named <= there and not left, f"missing or left over: {sorted(left)[:3]}")
    verdict.expect(not (samples / "staging").exists(), "staging is left over")


def full_disk(lab: Lab) -> Iterator[Verdict]:
    """C14: the samples' disk is full: one sentence, nothing committed; larger, it goes through."""
    source, samples = lab.folder / "archive-14", lab.folder / "c14" / "samples"
    key = write_archive(source, PhantomConfig(count=400, size=128, extras=False))
    verdict = Verdict("C14 full disk")
    with small_disk(samples.parent, 300 << 10) as mounted:
        if not mounted:
            verdict.figures["skipped"] = "this machine does not let us mount a small disk"
            yield verdict
            return
        job = Ingest(lab, source, samples)
        job.result_path = lab.folder / "c14.json"
        status = job.finish()
        verdict.expect(status == 1, f"status {status} instead of 1")
        verdict.expect("No space left" in job.said, f"the cause is not said: {job.said[-300:]}")
        verdict.expect("Traceback" not in _last_lines(job.said), "a traceback, not a sentence")
        verdict.expect(not (samples / "manifest.json").exists(), "a manifest of nothing")
        subprocess.run(["mount", "-o", "remount,size=200m", str(samples.parent)], check=True)
        again = Ingest(lab, source, samples)
        verdict.expect(again.finish() == 0, f"the next ingest failed: {_tail(again)}")
        manifest = SampleSet(str(samples)).manifest()
        verdict.expect(
            manifest is not None and manifest.counts["samples"] == key.images, "samples are missing"
        )
        verdict.expect(not (samples / "staging").exists(), "staging is left over")
    yield verdict


def damaged_shards(lab: Lab) -> Iterator[Verdict]:
    """C15: seven faults of Parquet files: each refused before the first step, with its name."""
    for name, damage in _FAULTS.items():
        shards = lab.folder / f"c15-{name.replace(' ', '-')}"
        shutil.copytree(make_shards(lab.folder / "shards"), shards)
        path, run_dir = damage(shards / "data" / "train-00001.parquet"), shards.with_suffix(".run")
        run = subprocess.run(
            [
                *(sys.executable, "-m", "medspark.train", "--shards", shards),
                *("--run_dir", run_dir, "--model.name", "mobilenetv2_050"),
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        verdict = Verdict(f"C15 {name}")
        verdict.expect(run.returncode == 2, f"status {run.returncode}: {run.stderr[-300:]}")
        verdict.expect(path.name in run.stderr, f"the file is not named: {run.stderr[-300:]}")
        verdict.expect(not list(run_dir.rglob("model.safetensors")), "it trained")
        yield verdict


def poisoned_archive(lab: Lab) -> Iterator[Verdict]:
    """C16: one file in twenty damaged, and eight bombs: all in quarantine, and memory is kept."""
    source, samples = lab.folder / "archive-16", lab.folder / "c16" / "samples"
    samples.parent.mkdir()
    key = write_archive(source, PhantomConfig(count=400, size=128, extras=False))
    damaged = _damage(source, every=20)
    expected = write_bombs(source / "bombs")
    with (source / "labels.csv").open("a") as table:
        columns = (source / "labels.csv").read_text().splitlines()[0].split(",")
        for name in expected:
            row = {"path": f"bombs/{name}", "label": "normal", "patient_id": f"bomb-{name}"}
            table.write(",".join(row.get(column, "") for column in columns) + "\n")
    verdict = Verdict("C16 poison")
    with _Peak() as peak:
        job = Ingest(lab, source, samples)
        verdict.expect(job.finish() == 0, f"the ingest failed: {_tail(job)}")
    if verdict.problems:
        yield verdict
        return
    result = job.result
    verdict.figures |= {"quarantined": result["quarantined"], **result["quarantine_reasons"]}
    verdict.expect(
        result["quarantined"] == damaged + len(expected),
        f"{result['quarantined']} quarantined instead of {damaged + len(expected)}",
    )
    verdict.expect(result["samples"] == key.images - damaged, f"{result['samples']} samples")
    reasons = _reasons(source, samples)
    for name, allowed in expected.items():
        found = reasons.get(f"bombs/{name}")
        verdict.expect(found in {reason.value for reason in allowed}, f"{name}: {found}")
    verdict.limit("MB of the largest worker", peak.bytes / 1e6, 600)
    yield verdict


class _Peak(threading.Thread):
    """The peak memory of the Python processes below the executors."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self._stop_it = 0, threading.Event()

    def run(self) -> None:
        while not self._stop_it.wait(0.05):
            for process in psutil.process_iter(["cmdline", "memory_info"]):
                words = " ".join(process.info["cmdline"] or [])
                if ("pyspark" in words and "daemon" in words) or "medspark.images.guard" in words:
                    memory = process.info["memory_info"]
                    self.bytes = max(self.bytes, memory.rss if memory else 0)

    def __enter__(self) -> _Peak:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_it.set()
        self.join()


def _damage(source: Path, *, every: int) -> int:
    files = sorted(path for path in source.rglob("*") if path.suffix in (".dcm", ".png"))
    files = files or sorted(p for p in source.rglob("*") if p.is_file() and p.suffix != ".csv")
    chosen = files[::every]
    for number, path in enumerate(chosen):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if number % 2 else b"\x00" * len(content))
    return len(chosen)


def _reasons(source: Path, samples: Path) -> dict[str, str]:
    with samples.with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {str(Path(row["path"]).relative_to(source)): row["reason"] for row in rows}


def _executor() -> psutil.Process | None:
    for process in psutil.process_iter(["cmdline"]):
        if any("CoarseGrainedExecutorBackend" in word for word in process.info["cmdline"] or []):
            return process
    return None


def _generations(samples: Path) -> list[Path]:
    return list((samples / "data").iterdir())


def _digest(samples: Path) -> str:
    manifest = SampleSet(str(samples)).manifest()
    assert manifest is not None
    return manifest.digest


def _copy(samples: Path, to: Path) -> Path:
    shutil.copytree(samples, to)
    return to


def _tail(job: Ingest) -> str:
    return job.said[-600:]


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-4:])


def _truncate(path: Path) -> Path:
    os.truncate(path, path.stat().st_size - 20)
    return path


def _empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def _remove(path: Path) -> Path:
    path.unlink()
    return path


def _duplicate(path: Path) -> Path:
    return Path(shutil.copy(path, path.with_name("train-00009.parquet")))


def _stray(path: Path) -> Path:
    stray = path.with_name("train-00001.parquet.tmp")
    stray.write_bytes(path.read_bytes()[:1000])
    return stray


def _flip(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def _flip_beside_checksum(path: Path) -> Path:
    """Flip a bit and write the checksum that Hadoop would find right."""
    _flip(path)
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).digest()
    path.with_name(f".{path.name}.crc").write_bytes(b"crc\0" + digest)
    return path


_FAULTS: dict[str, Callable[[Path], Path]] = {
    "truncated footer": _truncate,
    "zero length": _empty,
    "missing": _remove,
    "duplicate": _duplicate,
    "stray": _stray,
    "bit flip": _flip,
    "bit flip with crc": _flip_beside_checksum,
}

INGEST_ROWS: dict[str, Callable[[Lab], Iterator[Verdict]]] = {
    "C13": killed_ingest,
    "C14": full_disk,
    "C15": damaged_shards,
    "C16": poisoned_archive,
}
