"""Train without Spark, in one process or under torchrun.

python -m medspark.train --shards SHARDS [--config fit.yaml] [--train.epochs 6 ...]
torchrun --nproc_per_node 2 -m medspark.train --shards SHARDS
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from medspark.config import load_config
from medspark.errors import MedsparkError, UsageError
from medspark.job import DONE, FAILED, MISUSED, write_result
from medspark.memory import keep_freed_memory
from medspark.track.journal import Journal
from medspark.train.config import FitConfig
from medspark.train.loop import fit
from medspark.train.run_folder import check_run_folder, held_run
from medspark.train.world import join


class AloneConfig(FitConfig):
    """Fine-tune one classifier without Spark."""

    decides_nothing: ClassVar = frozenset({"overwrite"})

    overwrite: bool = Field(
        False, description="with resume never: replace the run in run_dir; other files there stay"
    )


def main(argv: Sequence[str]) -> int:
    """Train as ``argv`` says, write run_dir/result.json, and return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        config = load_config(AloneConfig, argv, description=__doc__ or "")
        keep_freed_memory()
        with _folder(config), join() as world:
            directory = config.run_dir / "journal" if world.is_main else None
            with Journal(directory) as journal:
                result = fit(config, world, journal)
            if world.is_main:
                write_result(config.run_dir / "result.json", result)
                print(json.dumps(result))
    except MedsparkError as error:
        print(f"medspark.train: {error}", file=sys.stderr)
        return MISUSED if isinstance(error, UsageError) else FAILED
    return DONE


def _folder(config: AloneConfig) -> AbstractContextManager[Path]:
    """Return a context that holds the folder of the run, on rank 0; a no-op on other ranks."""
    if os.environ.get("RANK", "0") != "0":
        return nullcontext(config.run_dir)
    check_run_folder(
        config.run_dir,
        fixed=True,
        shards=config.shards,
        model=config.model,
        distill=config.distill,
    )
    return held_run(config.run_dir, fixed=True, resume=config.resume, overwrite=config.overwrite)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
