"""Write a synthetic archive: python -m medspark.images.phantom FOLDER --count 2000 --size 96"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from medspark import ownership
from medspark.errors import UsageError
from medspark.images.phantom.archive import write_archive
from medspark.images.phantom.plan import PhantomConfig


def main(argv: Sequence[str]) -> int:
    """Write an archive, print its summary as JSON, and return the exit status."""
    defaults = PhantomConfig()
    parser = argparse.ArgumentParser(
        prog="python -m medspark.images.phantom",
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder to write, empty or missing")
    for name, about in PhantomConfig.model_fields.items():
        default = getattr(defaults, name)
        if isinstance(default, bool):
            parser.add_argument(
                f"--{name}", action=argparse.BooleanOptionalAction, default=default,
                help=about.description)  # fmt: skip
        elif isinstance(default, tuple):
            parser.add_argument(f"--{name}", nargs="+", type=type(default[0]), default=default,
                                choices=default, help=about.description)  # fmt: skip
        else:
            parser.add_argument(
                f"--{name}", type=type(default), default=default, help=about.description,
                choices=get_args(about.annotation) or None)  # fmt: skip
    arguments = vars(parser.parse_args(argv))
    folder = arguments.pop("folder")
    try:
        ownership.check(folder, "phantom archive")
    except UsageError as error:
        print(f"phantom: {error}", file=sys.stderr)
        return 2
    summary = write_archive(folder, PhantomConfig(**arguments))
    sys.stdout.write(json.dumps(asdict(summary), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
