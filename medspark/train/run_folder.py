"""The folder of one training: choose it, lock it, and decide what may be replaced in it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from medspark import ownership
from medspark.eps import with_eps
from medspark.errors import UsageError
from medspark.files import DRAFT
from medspark.job import write_result
from medspark.lock import locked
from medspark.models.config import PRETRAINED, ModelConfig
from medspark.train.config import DistillConfig

__all__ = ["CHECKPOINTS", "RUN_FILES", "check_run_folder", "held_run", "keep_result", "kept_result"]

_LOGGER = logging.getLogger(__name__)

# The settings and the result of a finished run, so that the same command need not run it again.
_FINISHED = "finished.json"

# The names of a training's files. No other file in the folder is ever removed.
CHECKPOINTS = (
    rf"checkpoints/(attempt|\.attempt-\d+|\.attempt{DRAFT})",
    r"checkpoints/\.?step-\d{9}-attempt-\d{4,}/state\.(safetensors|json)",
)
RUN_FILES = (
    *CHECKPOINTS,
    rf"attempts/\d{{4,}}/\.?(nonce|torchrun(-\d+)?\.log|result\.json|rank-\d+\.[a-z.]+)({DRAFT}|\.\d+(\.partial)?)?",
    rf"journal/\.?\d{{8}}-[0-9a-f]{{8}}\.(jsonl|tmp|jsonl{DRAFT})",
    rf"model/\.?model\.(safetensors|json)(\.tmp|{DRAFT})?",
    rf"report/(\.?result\.json(\.partial|{DRAFT})?|robustness\.md|MODEL_CARD\.md)",
    rf"\.?(run|result|finished)\.json(\.partial|{DRAFT})?",
)


def check_run_folder(
    place: Path,
    *,
    fixed: bool,
    shards: Path,
    model: ModelConfig,
    distill: DistillConfig | None = None,
) -> None:
    """Raise UsageError if the folder of the run is not medspark's, or overlaps the inputs."""
    sources = {
        "the shards": shards,
        "the file of first weights": None if model.weights == PRETRAINED else model.weights,
        "the teacher": distill.teacher if distill else None,
    }
    ownership.apart(sources, {"the folder of the run": place})
    ownership.check(place if fixed else _newest(place), "run")


@contextmanager
def held_run(
    place: Path,
    *,
    fixed: bool,
    resume: Literal["auto", "never"],
    overwrite: bool = False,
    demo: Path | None = None,
    files: Collection[str] = RUN_FILES,
) -> Iterator[Path]:
    """Lock the folder of a run, prepare it, and yield it.

    If ``fixed``, the folder is ``place``. Otherwise it is the newest of ``place``, ``place-2``,
    ``place-3`` and so on. If that one holds a finished run and ``resume`` is never, the run gets
    the next number. ``files`` are the names that the run's files may have, as regular expressions.
    A run on the built-in data in ``demo`` replaces an earlier run on it instead.

    Raises UsageError if another run holds the folder, or if a run in it would be lost.
    """
    folder = place if fixed else _newest(place)
    with ExitStack() as holding:
        holding.enter_context(_held(folder))
        if resume == "never":
            own = demo is not None and not fixed and _trained_on(demo, folder)
            renewed = overwrite or own
            if not (fixed or renewed) and _state(folder) == "finished":
                holding.close()
                folder = _next(place, folder)
                holding.enter_context(_held(folder))
            _check_replaceable(folder, renewed=renewed)
            _forget(folder, files)
        yield folder


def keep_result(folder: Path, result: dict[str, Any], *, run: str, asked: str) -> None:
    """Store the ``result`` of a run in its folder.

    ``run`` is the hash of the settings that decide the weights, ``asked`` that of all settings.
    """
    try:
        write_result(folder / _FINISHED, {"run": run, "asked": asked, "result": result})
    except OSError as error:
        _LOGGER.warning("cannot store the result in %s: %s", folder, error)


def kept_result(folder: Path, *, run: str, asked: str) -> dict[str, Any] | None:
    """Return the result of the finished run in ``folder`` if its settings hash to ``asked``.

    Raises UsageError if the settings that decide its weights do not hash to ``run``.
    """
    kept = _read(folder / _FINISHED)
    if kept and kept.get("run") != run:
        raise UsageError(
            f"{folder} holds a run with other data or another configuration: use another "
            "--run_dir, or --overwrite to start again there."
        )
    return dict(with_eps(kept["result"])) if kept and kept.get("asked") == asked else None


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    ownership.claim(folder, "run")
    with locked(folder):
        yield


def _check_replaceable(folder: Path, *, renewed: bool) -> None:
    state = _state(folder)
    if renewed or state == "empty":
        return
    if state == "finished":
        raise UsageError(
            f"{folder} holds a finished run: --overwrite replaces it, --resume auto returns its "
            "result, and another --run_dir keeps both."
        )
    raise UsageError(
        f"{folder} holds an unfinished run: --resume auto continues it, and --overwrite starts "
        "again there."
    )


def _forget(folder: Path, files: Collection[str]) -> None:
    """Remove the files of an earlier run from ``folder``, and no other files."""
    ownership.remove(folder, [*files, *(f"plain/{name}" for name in files)])


def _state(folder: Path) -> Literal["empty", "unfinished", "finished"]:
    """Return how far the run in ``folder`` came; "empty" if it failed before a checkpoint."""
    record, plain = _read(folder / "run.json"), _read(folder / "plain" / "run.json")
    alone = _read(folder / "result.json")  # written by python -m medspark.train
    if (folder / _FINISHED).exists() or _status(record) == "FINISHED" or "model" in alone:
        return "finished"
    network = (folder / "model" / "model.json").exists()
    places = (folder / "checkpoints", folder / "plain" / "checkpoints")
    checkpoint = any(path for place in places for path in place.glob("step-*"))
    stopped = any(known and _status(known) != "FAILED" for known in (record, plain))
    return "unfinished" if network or checkpoint or stopped else "empty"


def _status(record: dict[str, Any]) -> str | None:
    ending = record.get("ending")
    return ending.get("status") if isinstance(ending, dict) else None


def _trained_on(data: Path, folder: Path) -> bool:
    """Return whether the run in ``folder`` used a dataset below the folder ``data``."""
    entry = (_read(folder / "run.json") or _read(folder / "plain" / "run.json")).get("entry")
    dataset = entry.get("dataset") if isinstance(entry, dict) else None
    source = dataset.get("source") if isinstance(dataset, dict) else None
    return isinstance(source, str) and Path(source).resolve().is_relative_to(data.resolve())


def _newest(place: Path) -> Path:
    folder = place
    while (after := _next(place, folder)).exists():
        folder = after
    return folder


def _next(place: Path, folder: Path) -> Path:
    """Return the folder after ``folder``: x.run, x-2.run, x-3.run, ..."""
    number = re.fullmatch(re.escape(place.stem) + r"-(\d+)", folder.stem)
    return place.with_stem(f"{place.stem}-{int(number[1]) + 1 if number else 2}")


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
