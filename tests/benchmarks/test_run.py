"""Every benchmark can be found, whatever libraries of peers are missing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path


def test_all_benchmarks_are_listed() -> None:
    script = Path(__file__).with_name("run.py")

    done = subprocess.run([sys.executable, script, "--list"], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    topics = {name.partition("/")[0] for name in done.stdout.split()}
    assert {"step_vs_plain", "loader_vs_petastorm", "ingest_vs_limit", "pgd_vs_art"} <= topics
    assert {"executors_vs_torchrun", "weak_scaling_2", "data_wait_share"} <= topics
    assert {"federation_vs_limit", "federation_memory"} <= topics
    if importlib.util.find_spec("onnxruntime"):
        assert "edge" in topics
