"""Goals, table and record of what tests/scale/run.py measured."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "make scale"
LARGE = 100_000  # files
# name: (title of the column, digits)
COLUMNS = {
    "ingest_per_second": ("ingest, images/s", 0),
    "shard_per_second": ("shard, images/s", 0),
    "train_per_second": ("train, images/s", 0),
    "again_share": ("again with 1 % new ÷ first", 3),
    "driver_mb": ("driver, MB", 0),
    "worker_mb": ("largest worker, MB", 0),
    "executor_jvm_mb": ("executor's JVM, MB", 0),
    "open_seconds": ("opened and planned, s", 2),
    "rank_mb": ("rank, MB", 0),
}


def goals(sizes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the figures that have a goal, of the largest size or against the smallest."""
    first, last = sizes[0], sizes[-1]
    rows = [
        _row("throughput", last["ingest_per_second"] / first["ingest_per_second"], 0.9, True),
        _row("driver_memory", last["driver_mb"] / first["driver_mb"], 1.1, False),
        _row("again", last["again_share"], 0.05, False),
        _row("open_seconds", last["open_seconds"], 2.0, False),
    ]
    # What grows cannot be told from one size, nor what is new from what a few Spark jobs take.
    told = rows if first is not last else rows[2:]
    return told if last["files"] >= LARGE else told[:-2] + told[-1:]


def _row(name: str, value: float, goal: float, higher: bool) -> dict[str, Any]:
    reached = value >= goal if higher else value <= goal
    return {"name": name, "value": value, "goal": goal, "reached": reached}


def table(result: Mapping[str, Any]) -> list[str]:
    """Return the lines of a Markdown table of the sizes, and a line for each goal."""
    lines = [
        "| files | " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "| ---: |" + " ---: |" * len(COLUMNS),
    ]
    for size in result["sizes"]:
        cells = [
            "" if size[name] is None else f"{size[name]:,.{digits}f}"
            for name, (_, digits) in COLUMNS.items()
        ]
        lines.append(f"| {size['files']:,} | " + " | ".join(cells) + " |")
    said = {True: "reached", False: "NOT reached"}
    lines += [
        f"{row['name']}: {row['value']:.3f}, goal {row['goal']}: {said[row['reached']]}"
        for row in result["rows"]
    ]
    return lines


def record_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of tests/claims that says what was measured."""
    figures: dict[str, Any] = {}
    cells = []
    for size in result["sizes"]:
        row = [f"{size['files']:,}"]
        for name, (_, digits) in COLUMNS.items():
            key = f"{name}_{size['files']}"
            if size[name] is None:
                row.append("")
                continue
            path = f"sizes[files={size['files']}]{name}"
            figures[key] = {"value": size[name], "digits": digits, "path": path}
            row.append(f"{{{key}}}")
        cells.append("| " + " | ".join(row) + " |")
    for row_ in result["rows"]:
        path = f"rows[name={row_['name']}]value"
        figures[row_["name"]] = {"value": row_["value"], "digits": 3, "path": path}
    said = [f"{row['name']} {{{row['name']}}} (goal {row['goal']})" for row in result["rows"]]
    return {
        "what": "How speed and memory of ingest, shard and training grow with the number of files.",
        "commands": [COMMAND],
        "result": "build/scale.json",
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{result['cores']} shared cores, no accelerator",
        "seeds": [0],
        "figures": figures,
        "text": [
            "Phantom DICOM files of 64 x 64 with labels by folder, on a cluster of one executor.",
            "Start-up, which is the time for 100 files, is taken off. The driver's memory is its",
            "Python process and what its JVM holds after a collection, the most of all steps:",
            "",
            *table({"sizes": [], "rows": []}),
            *cells,
            "",
            "At the largest size, and of it against the smallest: " + "; ".join(said) + ".",
        ],
    }  # fmt: skip


def _commit() -> str:
    asked = ["git", "rev-parse", "--short=8", "HEAD"]
    return subprocess.run(
        asked, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
