"""What tests/scale/simulate.py measures on: datasets without pixels that open as real ones do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simulated_ledger
import simulated_shards

from medspark.ingest import ledger
from medspark.shards.manifest import read_manifest, verify

HERE = Path(__file__).parent


def test_simulated_shards_take_no_disk_for_pixels_and_open_as_a_rank_opens_them(tmp_path: Path):
    rows = 30_000
    manifest = simulated_shards.write(tmp_path, rows)

    verify(tmp_path, manifest, contents=False)
    used = sum(path.stat().st_blocks * 512 for path in (tmp_path / "data").iterdir())
    assert used < rows * simulated_shards.FORMAT.nbytes / 10
    assert read_manifest(tmp_path).splits["train"].rows == 21_000
    command = [sys.executable, str(HERE / "open_shards.py"), str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(said)["rows"] == rows


def test_a_simulated_ledger_has_the_columns_of_one(tmp_path: Path):
    manifest = simulated_ledger.write(tmp_path, 5_000, processes=1)

    table = pq.read_table(tmp_path / manifest.ledger[0])
    assert table.schema == ledger.STORED
    assert len(set(table["file_key"].to_pylist())) == 5_000
    assert len(set(table["patient_key"].to_pylist())) == 2_500
    assert all(re.fullmatch("[0-9a-f]{32}", key) for key in table["pixel_key"].to_pylist())


def test_new_rows_share_pixels_and_patients_with_old_ones(tmp_path: Path):
    count, new = 1_000, 500
    numbers = pa.RecordBatch.from_pydict({"id": np.arange(new)})
    (batch,) = simulated_ledger.Fresh(count, ledger.STORED)([numbers])
    old = np.arange(count)
    known = simulated_ledger.rows(old, old, old // 2)

    shared = {
        name: len(set(batch[name].to_pylist()) & set(known[name].to_pylist()))
        for name in ("pixel_key", "patient_key")
    }
    assert shared["pixel_key"] == 5
    assert 10 <= shared["patient_key"] <= 15
