"""Two processes: one exchange of gradients a step, and the same training as one process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medspark.train.config import FitConfig
from medspark.train.loop import fit
from medspark.train.world import World

pytestmark = pytest.mark.ddp

RANKS = Path(__file__).with_name("ranks.py")
ALONE = World(0, 0, 1, torch.device("cpu"))
Together = Callable[..., tuple[Path, list[dict[str, Any]]]]

_SPEC = importlib.util.spec_from_file_location("train_ranks", RANKS)
assert _SPEC is not None
assert _SPEC.loader is not None
ranks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(ranks)


def fit_config(shards: Path, run_dir: Path, precision: str = "fp32") -> FitConfig:
    return FitConfig.model_validate(
        {
            "shards": shards,
            "run_dir": run_dir,
            "model": {"name": "test_efficientnet"},
            "attack": {"eps": "8/255"},
            "train": {
                "epochs": 2,
                "batch_size": 15,
                "batch_norm": "frozen",
                "precision": precision,
                "log_every": 3,
                "awp": 0.005,
                "awp_after": 0.0,
                "cutmix": 1.0,
            },
            "evaluate": {"attacks": ["fgsm"], "sanity_images": 0},
        }
    )


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Together:
    """Return a function that runs ranks.py in some processes and returns what each found."""

    def run(
        shards: Path, processes: int = 2, gpus: str = "", **chosen: str
    ) -> tuple[Path, list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp("ranks")
        config = fit_config(shards, folder / "run", **chosen)
        (folder / "fit.json").write_text(config.model_dump_json())
        subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc_per_node", str(processes), str(RANKS), str(shards), str(folder)),
            ],
            check=True,
            timeout=120,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpus},
        )
        written = [folder / f"rank-{rank}.json" for rank in range(processes)]
        return folder, [json.loads(path.read_text()) for path in written]

    return run


def memory_can_be_shared() -> bool:
    """Return whether a process of this machine may open the memory of another."""
    try:
        descriptor = os.memfd_create("test")
    except (AttributeError, OSError):
        return False
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    opened = subprocess.run([sys.executable, "-c", f"open({path!r}, 'r+b', buffering=0)"])
    os.close(descriptor)
    return opened.returncode == 0


def test_two_processes_train_as_one_does(
    together: Together,
    write_shards: Callable[..., Path],
    tmp_path: Path,
):
    shards = write_shards(rows=44, side=32)
    folder, (first, second) = together(shards)
    alone = ranks.Losses()
    fit(fit_config(shards, tmp_path / "alone"), ALONE, alone)

    assert first["all_reduces"] == second["all_reduces"]
    assert first["all_reduces"] == {name: [1, 1, 1] for name in ranks.VARIANTS}
    shared = memory_can_be_shared()
    assert first.get("signals") == second.get("signals")
    assert first.get("signals") == (first["all_reduces"] if shared else None)
    assert first["losses"] == second["losses"]
    assert first["gathered"] == second["gathered"] == [[0], [0, 1, 2, 3]]
    assert [float(v) for v in first["losses"].values()] == pytest.approx(
        list(alone.by_step.values()), rel=1e-3
    )
    assert len(alone.by_step) == 6
    for found in (first, second):
        assert found["losses over sockets"] == pytest.approx(first["losses"], rel=1e-6)
        assert found["ways"] == {
            "one host": "OneHost" if shared else "Overlapped",
            "elsewhere": "Overlapped",
            "hidden": "Overlapped",
            "other memory": "Overlapped",
            "full": "Overlapped",
        }
    for way in ranks.EXACT:
        ranks.exact(ALONE, way, folder / f"exact-{way}-alone.safetensors")
        names = [f"exact-{way}-{who}.safetensors" for who in ("alone", "0", "1")]
        single, *both = [load_file(folder / name) for name in names]
        differing = {k for found in both for k in single if not torch.equal(single[k], found[k])}
        assert differing == set()


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_one_process_trains_over_nccl_nearly_as_on_the_cpu(
    device: torch.device,
    together: Together,
    write_shards: Callable[..., Path],
    tmp_path: Path,
):
    shards = write_shards(rows=44, side=32)
    _, (found,) = together(shards, processes=1, gpus="0", precision="auto")
    alone = ranks.Losses()
    fit(fit_config(shards, tmp_path / "alone"), ALONE, alone)

    assert found["backend"] == "nccl"
    assert found["all_reduces"] == {name: [1, 1, 1] for name in ranks.VARIANTS}
    assert list(found["losses"].values()) == pytest.approx(list(alone.by_step.values()), abs=0.05)
