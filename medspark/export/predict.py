"""Predict for image files with an exported model; no torch, Spark or MLflow.

    python -m medspark.export.predict MODEL_FOLDER image.dcm [...]

Prints a JSON list with an entry for each file: its calibrated probabilities, or one sentence that
says why the file cannot be read. The exit status is 0, or 1 if a file cannot be read, or 2 if the
model cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medspark.errors import MedsparkError, UsageError
from medspark.export.runtime import DeployedModel
from medspark.images.guard import GuardedDecoder
from medspark.images.limits import Limits
from medspark.images.reasons import Unreadable
from medspark.models.prediction import answer_of, as_pixels, rendering_of

__all__ = ["main", "predictions"]

# Enough for 4,096 x 5,120 pixels of 16 bits in JPEG 2000, and fit for a small device.
LIMITS = Limits(
    file_bytes=1 << 28,
    frame_pixels=1 << 25,
    frame_seconds=60,
    file_seconds=60,
    memory_bytes=512 << 20,
)


def predictions(model: DeployedModel, files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield for each file its name, label and probabilities, or its name and an ``error``.

    Native decoders run in a child process. The middle frame stands for a file of several frames.
    """
    with GuardedDecoder(rendering=rendering_of(model.card), limits=LIMITS) as decoder:
        for file in files:
            yield {"file": str(file)} | _prediction(model, decoder, file)


def _prediction(model: DeployedModel, decoder: GuardedDecoder, file: Path) -> dict[str, Any]:
    try:
        (frame,) = decoder.decode(file)
    except Unreadable as unreadable:
        return {"error": f"The image cannot be read: {unreadable.message}."}
    (row,) = model(as_pixels(frame.pixels)[None])
    return answer_of(row, model.card)


def main(argv: Sequence[str]) -> int:
    """Print the predictions; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m medspark.export.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="MODEL_FOLDER", help="an exported model")
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="DICOM, PNG, JPEG, TIFF"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of the graph (1)")
    asked = parser.parse_args(argv)
    try:
        found = list(
            predictions(DeployedModel.load(asked.model, threads=asked.threads), asked.files)
        )
    except MedsparkError as error:
        print(f"predict: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print(json.dumps(found, indent=1))
    return 1 if any("error" in each for each in found) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
