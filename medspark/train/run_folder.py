"""The folder of one training: which one it is, who holds it, and what of it may be replaced."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from medspark import ownership
from medspark.eps import with_eps
from medspark.errors import UsageError
from medspark.job import write_result
from medspark.lock import locked
from medspark.models.config import PRETRAINED, ModelConfig
from medspark.train.config import DistillConfig

__all__ = ["CHECKPOINTS", "RUN_FILES", "check_run_folder", "held_run", "keep_result", "kept_result"]

_LOGGER = logging.getLogger(__name__)

# A run with its result, so that it need not be done again.
_FINISHED = "finished.json"

# What a training names in its folder: nothing else there is ever removed.
CHECKPOINTS = (
    r"checkpoints/(attempt|\.attempt-\d+)",
    r"checkpoints/\.?step-\d{9}-attempt-\d{4,}/state\.(safetensors|json)",
)
RUN_FILES = (
    *CHECKPOINTS,
    r"attempts/\d{4,}/\.?(nonce|torchrun(-\d+)?\.log|result\.json|rank-\d+\.[a-z.]+)(\.\d+(\.partial)?)?",
    r"journal/\d{8}-[0-9a-f]{8}\.(jsonl|tmp)",
    r"model/model\.(safetensors|json)(\.tmp)?",
    r"report/(result\.json|\.result\.json\.partial|robustness\.md|MODEL_CARD\.md)",
    r"run\.json|\.run\.json\.partial|result\.json|finished\.json|\.finished\.json\.partial",
)


def check_run_folder(
    place: Path, *, fixed: bool, shards: Path, model: ModelConfig, distill: DistillConfig | None
) -> None:
    """Raise UsageError where the folder of a run is somebody else's, or holds what it reads."""
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
) -> Iterator[Path]:
    """Hold the folder of a run, ready for it, against all others, and yield it.

    It is ``place``, or the newest of ``place`` and what runs got beside it: without being
    ``fixed``, a run that does not ``resume`` leaves a finished one alone and gets a folder of its
    own. A run on the built-in data, which lies in ``demo``, renews one of its own.

    Raises UsageError where another run is at work there, or one would be lost.
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
            _forget(folder)
        yield folder


def keep_result(folder: Path, result: dict[str, Any], *, run: str, asked: str) -> None:
    """Keep the ``result`` of a run; ``run`` is what decides its weights, ``asked`` all of it."""
    try:
        write_result(folder / _FINISHED, {"run": run, "asked": asked, "result": result})
    except OSError as error:
        _LOGGER.warning("the result is not kept in %s: %s", folder, error)


def kept_result(folder: Path, *, run: str, asked: str) -> dict[str, Any] | None:
    """Return the result of the finished run in ``folder`` if all was ``asked`` as now.

    Raises UsageError where the run there is another one.
    """
    kept = _read(folder / _FINISHED)
    if kept and kept.get("run") != run:
        raise UsageError(
            f"{folder} holds a run of other data or another configuration: give another --run_dir, "
            "or --overwrite to begin again there."
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
        f"{folder} holds a run that did not finish: --resume auto goes on with it, and --overwrite "
        "begins again there."
    )


def _forget(folder: Path) -> None:
    """Remove what an earlier run left in ``folder``, and nothing else."""
    ownership.remove(folder, [*RUN_FILES, *(f"plain/{name}" for name in RUN_FILES)])


def _state(folder: Path) -> Literal["empty", "unfinished", "finished"]:
    """Return how far the run in ``folder`` came; one that failed early left nothing of worth."""
    record, plain = _read(folder / "run.json"), _read(folder / "plain" / "run.json")
    alone = _read(folder / "result.json")  # of python -m medspark.train
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
    """Return whether the run in ``folder`` was on what lies below ``data``."""
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
    found = re.fullmatch(re.escape(place.stem) + r"-(\d+)", folder.stem)
    return place.with_stem(f"{place.stem}-{int(found[1]) + 1 if found else 2}")


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
