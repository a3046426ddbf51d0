"""Files that are mapped into memory and not kept open."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import psutil
import pytest

from medspark.shards.mapping import map_file


def test_a_mapped_file_is_read_and_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_bytes(bytes(range(256)))

    mapped = map_file(tmp_path / "file")

    assert np.array_equal(mapped, np.arange(256))
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1


def test_mappings_keep_no_file_open(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"x" * 5000)
    before = psutil.Process().num_fds()

    held = [map_file(tmp_path / "file") for _ in range(50)]

    assert psutil.Process().num_fds() == before
    assert sum(int(mapped[4999]) for mapped in held) == 50 * ord("x")


def test_a_mapping_lives_as_long_as_its_views(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"y" * 5000)

    view = map_file(path)[1000:].reshape(-1, 4)
    os.unlink(path)
    gc.collect()

    assert view.sum() == 4000 * ord("y")
    del view
    gc.collect()
    if Path("/proc/self/maps").exists():
        assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_file_that_cannot_be_mapped_is_named(tmp_path: Path):
    (tmp_path / "empty").touch()

    with pytest.raises(OSError, match="empty"):
        map_file(tmp_path / "empty")
