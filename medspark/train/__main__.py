"""Train without Spark: one process, or under torchrun.

python -m medspark.train --shards SHARDS [--config fit.yaml] [--train.epochs 6 ...]
torchrun --nproc_per_node 2 -m medspark.train --shards SHARDS
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence

from medspark.config import load_config
from medspark.errors import MedsparkError, UsageError
from medspark.job import DONE, FAILED, MISUSED, write_result
from medspark.memory import keep_freed_memory
from medspark.track.journal import Journal
from medspark.train.config import FitConfig
from medspark.train.loop import fit
from medspark.train.world import join


def main(argv: Sequence[str]) -> int:
    """Train as ``argv`` says and return the exit status; the result is in run_dir/result.json."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        config = load_config(FitConfig, argv, description=__doc__ or "")
        keep_freed_memory()
        with join() as world:
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
