"""federate on a real cluster: the bits of the weights do not depend on who trained the clients."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from standalone import ROOT, StandaloneCluster

from medspark.federate.folder import FederationFolder

pytestmark = [pytest.mark.slow, pytest.mark.spark]

RECIPE = (
    *("--clients.by", "dirichlet", "--clients.count", 6, "--clients.per_round", 5),
    *("--rounds", 2, "--batch_size", 8, "--lr", 0.05, "--model.name", "test_resnet"),
    *("--evaluate.attacks", "fgsm", "--evaluate.sanity_images", 0, "--validate_rounds.every", 0),
    *("--track.system_metrics", "false", "--track.log_model", "false"),
)


def _weights(place: Path) -> bytes:
    return FederationFolder(place / "result.run").read(1, "weights").tobytes()


@pytest.mark.parametrize("rule", ["fedavg", "multi_krum"])
def test_two_executors_come_to_the_bits_of_one_process(
    cluster: StandaloneCluster, write_shards: Callable[..., Path], tmp_path: Path, rule: str
) -> None:
    shards = write_shards(rows=48, side=32)

    def words(place: Path) -> list[str]:
        place.mkdir()
        own = ("--output", place / "result.json", "--track.uri", f"sqlite:///{place}/mlflow.db")
        return list(map(str, ("--shards", shards, "--aggregate", rule, *RECIPE, *own)))

    job = cluster.submit("federate.py", *words(tmp_path / "two"))
    said, _ = job.communicate(timeout=240)
    assert job.returncode == 0, said[-3000:]
    one = [sys.executable, ROOT / "jobs" / "federate.py", *words(tmp_path / "one")]
    subprocess.run([*one, "--spark.master", "local[1]"], check=True, capture_output=True)

    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["tasks"] == 2
    assert [len(each["clients"]) for each in result["rounds"]] == [5, 5]
    assert _weights(tmp_path / "two") == _weights(tmp_path / "one")
