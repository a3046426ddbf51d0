"""Two processes: one all-reduce per bucket and step, and the same training as one process."""

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

from medspark.train.adversarial import MODES
from medspark.train.config import FitConfig
from medspark.train.loop import fit
from medspark.train.world import World

pytestmark = pytest.mark.ddp

RANKS = Path(__file__).with_name("ranks.py")
ALONE = World(0, 0, 1, torch.device("cpu"))
Together = Callable[[Path], tuple[Path, list[dict[str, Any]]]]

_SPEC = importlib.util.spec_from_file_location("train_ranks", RANKS)
assert _SPEC is not None
assert _SPEC.loader is not None
ranks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(ranks)


def fit_config(shards: Path, run_dir: Path) -> FitConfig:
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
                "precision": "fp32",
                "log_every": 3,
            },
            "evaluate": {"attacks": ["fgsm"], "sanity_images": 0},
        }
    )


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Together:
    """Return a function that runs ranks.py in two processes and returns what each found."""

    def run(shards: Path) -> tuple[Path, list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp("ranks")
        config = fit_config(shards, folder / "run")
        (folder / "fit.json").write_text(config.model_dump_json())
        subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc_per_node", "2", str(RANKS), str(shards), str(folder)),
            ],
            check=True,
            timeout=120,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for mode in ("fused_noise", "free"):
            ranks.exact(ALONE, mode, folder / f"exact-{mode}-alone.safetensors")
        return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]

    return run


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
    variants = [*MODES, "fused, dual", "fused, accumulated"]
    assert first["all_reduces"] == {name: [1, 1, 1] for name in variants}
    assert first["losses"] == second["losses"]
    assert [float(v) for v in first["losses"].values()] == pytest.approx(
        list(alone.by_step.values()), rel=1e-3
    )
    assert len(alone.by_step) == 6
    for mode in ("fused_noise", "free"):
        names = [f"exact-{mode}-{who}.safetensors" for who in ("alone", "0", "1")]
        single, *both = [load_file(folder / name) for name in names]
        differing = {k for found in both for k in single if not torch.equal(single[k], found[k])}
        assert differing == set()
