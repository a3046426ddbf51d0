"""From 10^4 to 10^6 files: how speed and memory of ingest, shard and training grow.

    python tests/scale/run.py --sizes 10000                     about 3 minutes, .3 GB
    python tests/scale/run.py --sizes 10000,100000,1000000      the whole table
    make scale [SIZES=10000]

Every size: phantom DICOM files of 64 x 64 are made, ingested, ingested again with 1 % new, cut into
shards, opened as by a rank, and trained on for one epoch. A step that is done is kept, so that the
same command goes on after an interruption. What a step no longer needs is removed (not with
--keep). A size of 100 files comes first: its times are taken as start-up.

Reads   nothing
Writes  below --folder; the result --output (JSON) and a table; with --record a record for
        tests/claims
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from scale_report import goals, record_of, table
from scale_steps import Size

START_UP = 100  # files
# On disk a file takes 8 kB; samples and shards take 5 kB each. Measured on two cores.
_BYTES_A_FILE = 14_000
_SECONDS_A_FILE = {"steps": 0.0025, "train": 0.002}
_SECONDS_A_SIZE = 150


def main(argv: Sequence[str]) -> int:
    """Run the sizes; return 0 if every goal is reached."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="10000,100000,1000000", help="files, between commas")
    parser.add_argument("--folder", type=Path, default=Path("build/scale"))
    parser.add_argument("--output", type=Path, default=Path("build/scale.json"))
    parser.add_argument("--record", type=Path, help="also write a record, as of tests/claims")
    parser.add_argument("--keep", action="store_true", help="keep archives, samples and shards")
    parser.add_argument("--train", action=argparse.BooleanOptionalAction, default=True)
    chosen = parser.parse_args(argv)
    sizes = sorted({int(size) for size in chosen.sizes.split(",")})
    folder = chosen.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not _announced(folder, sizes, train=chosen.train):
        return 2
    done = {
        files: Size(folder, files, keep=chosen.keep).run(train=chosen.train and files > START_UP)
        for files in (START_UP, *sizes)
    }
    result = {"job": "scale", "cores": os.cpu_count(), **_result(done)}
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(table(result)))
    if chosen.record is not None:
        chosen.record.write_text(json.dumps(record_of(result), indent=1) + "\n")
    print(chosen.output)
    return int(not all(row["reached"] for row in result["rows"]))


def _announced(folder: Path, sizes: Sequence[int], *, train: bool) -> bool:
    """Say what it will take, and return whether the disk has room for it."""
    largest, files = max(sizes), sum(sizes)
    each = _SECONDS_A_FILE["steps"] + (_SECONDS_A_FILE["train"] if train else 0)
    minutes = (files * each + _SECONDS_A_SIZE * len(sizes)) / 60
    wanted, free = largest * _BYTES_A_FILE / 1e9, shutil.disk_usage(folder).free / 1e9
    print(f"about {minutes:.0f} minutes and {wanted:.1f} GB in {folder} ({free:.0f} GB are free)")
    if wanted > 0.9 * free:
        print("the disk has too little room: give --folder or smaller --sizes", file=sys.stderr)
        return False
    return True


def _result(done: Mapping[int, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    start = done[START_UP]
    sizes = [_figures(files, steps, start) for files, steps in done.items() if files > START_UP]
    return {"start_up": start, "sizes": sizes, "rows": goals(sizes)}


def _figures(
    files: int, steps: dict[str, dict[str, Any]], start: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return the figures of one size; seconds are without those of the start-up."""
    seconds = {
        name: steps[name]["seconds"] - start[name]["seconds"]
        for name in ("ingest", "again", "shard")
    }
    ingest = steps["ingest"]
    return {
        "files": files,
        "ingest_per_second": (files - START_UP) / seconds["ingest"],
        "shard_per_second": (files - START_UP) / seconds["shard"],
        "again_share": seconds["again"] / seconds["ingest"],
        "again_share_with_start_up": steps["again"]["seconds"] / ingest["seconds"],
        "driver_mb": max(
            steps[name]["peak_mb"]["driver"] + (steps[name]["driver_heap_mb"] or 0)
            for name in ("ingest", "again", "shard")
        ),
        "driver_jvm_rss_mb": max(
            steps[name]["peak_mb"]["driver_jvm"] for name in ("ingest", "again", "shard")
        ),
        "worker_mb": max(steps[name]["peak_mb"]["worker"] for name in ("ingest", "shard")),
        "executor_jvm_mb": max(
            steps[name]["peak_mb"]["executor_jvm"] for name in ("ingest", "shard")
        ),
        "open_seconds": steps["plan"]["open_seconds"],
        "rank_mb": steps["plan"]["rank_mb"],
        "train_per_second": steps.get("train", {}).get("images_per_second"),
        "data_wait_share": steps.get("train", {}).get("data_wait_share"),
        "steps": steps,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
