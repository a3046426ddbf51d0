"""The served model: image files in base64 in, calibrated probabilities out."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from medspark.errors import RunError, UsageError
from medspark.images.limits import Limits
from medspark.images.pool import Busy, DecoderPool, Turn, Turns
from medspark.images.reasons import Unreadable
from medspark.models.prediction import as_pixels, rendering_of
from medspark.models.predictor import Predictor

__all__ = ["SERVING", "FilePredictor", "serving_limits"]

# The limits per file: 4,096 x 5,120 pixels of 16 bits in JPEG 2000 fit.
SERVING = Limits(
    file_bytes=1 << 26,
    frame_pixels=1 << 25,
    frame_seconds=20,
    file_seconds=20,
    memory_bytes=384 << 20,
)
C = TypeVar("C", Limits, Turns)
_PREFIX = "MEDSPARK_SERVE_"
_BATCH = 8  # files per batch; the time of a turn is checked between batches


class FilePredictor:
    """Classifies DICOM, PNG, JPEG and TIFF files in base64, decoded as the training images were.

    Separate processes decode the files, so a file that crashes, stalls or exhausts the memory of
    its decoder does no harm to this process. Several threads may call a predictor; they take turns.
    """

    def __init__(
        self, predictor: Predictor, *, limits: Limits = SERVING, turns: Turns | None = None
    ) -> None:
        self._predictor = predictor
        rendering = rendering_of(predictor.card)
        self._limits = limits
        self._pool = DecoderPool(rendering=rendering, limits=limits, turns=turns or Turns())

    @classmethod
    def load(cls, folder: Path) -> FilePredictor:
        """Return the predictor of the model in ``folder``, with limits from the environment.

        Raises UsageError if ``folder`` holds no model, or for an unknown or invalid limit.
        """
        return cls.of(Predictor.load(folder))

    @classmethod
    def of(cls, predictor: Predictor) -> FilePredictor:
        """Return the predictor of files by ``predictor``, with limits from the environment.

        Raises UsageError for an unknown or invalid limit.
        """
        limits, turns = serving_limits(os.environ)
        return cls(predictor, limits=limits, turns=turns)

    def __call__(self, files: Sequence[str]) -> list[dict[str, Any]]:
        """Return for each of ``files`` the predictor's answer, with label and probabilities.

        A file that cannot be classified gets an ``error`` instead, a sentence with the reason.
        """
        answers: list[dict[str, Any]] = []
        try:
            with self._pool.turn() as turn:
                for start in range(0, len(files), _BATCH):
                    answers += self._answers(files[start : start + _BATCH], turn)
        except Busy:
            answers += [_error(_BUSY)] * (len(files) - len(answers))
        return answers

    @property
    def columns(self) -> list[str]:
        """The names of all values that an answer may have."""
        return [*self._predictor.columns, "error"]

    def close(self) -> None:
        """Stop the decoder processes."""
        self._pool.close()

    def _answers(self, files: Sequence[str], turn: Turn) -> Iterator[dict[str, Any]]:
        decoded = [self._pixels(text, turn) for text in files]
        images = [found for found in decoded if not isinstance(found, str)]
        answers = iter(self._predictor.answers(np.stack(images)) if images else ())
        for found in decoded:
            yield _error(found) if isinstance(found, str) else next(answers)

    def _pixels(self, text: object, turn: Turn) -> npt.NDArray[np.generic] | str:
        """Return the pixels (H, W, C) of a file in base64, or a sentence with the error."""
        try:
            (frame,) = turn.decode(self._content(text))
        except (binascii.Error, ValueError):
            return "The image is not base64."
        except Unreadable as error:
            return f"The image cannot be read: {error.message}."
        except (Busy, RunError) as error:
            return str(error) or _BUSY
        return as_pixels(frame.pixels)

    def _content(self, text: object) -> bytes:
        if not isinstance(text, str):
            raise ValueError("not text")
        # Check the size before base64 decoding copies the content. Lines may be broken (RFC 2045,
        # 6.8), as those of Spark's base64() are.
        length = len(text) - text.count("\r") - text.count("\n")
        self._limits.check_file(max(1, length // 4 * 3 - text[-2:].count("=")))
        return base64.b64decode(text.replace("\r", "").replace("\n", ""), validate=True)


_BUSY = "The server has no time left for this image: send it again, later or with fewer others."


def _error(sentence: str) -> dict[str, Any]:
    return {"error": sentence}


def serving_limits(environment: Mapping[str, str]) -> tuple[Limits, Turns]:
    """Return the server's limits, changed by the MEDSPARK_SERVE_… variables of ``environment``.

    A variable ends with the name of a limit in capitals, for example MEDSPARK_SERVE_FILE_SECONDS.
    Raises UsageError for an unknown or invalid one.
    """
    given = {
        name.removeprefix(_PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(_PREFIX)
    }
    unknown = given.keys() - Limits.model_fields.keys() - Turns.model_fields.keys()
    if unknown:
        known = ", ".join(sorted(map(str.upper, [*Limits.model_fields, *Turns.model_fields])))
        name = _PREFIX + min(unknown).upper()
        raise UsageError(f"{name} is no setting of a served model. {_PREFIX} precedes: {known}.")
    try:
        return _changed(SERVING, given), _changed(Turns(), given)
    except ValidationError as error:
        problem = error.errors()[0]
        name = _PREFIX + str(problem["loc"][0]).upper()
        raise UsageError(f"{name} is not valid: {problem['msg']}.") from None


def _changed(defaults: C, given: Mapping[str, str]) -> C:
    known = {name: value for name, value in given.items() if name in type(defaults).model_fields}
    return type(defaults).model_validate(defaults.model_dump() | known)
