"""The spool of a run: a folder with its description, its publishing state and its ending."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from medspark.config import Config, first_problem
from medspark.documents import read_regular
from medspark.errors import RunError
from medspark.files import write_whole
from medspark.redact import redacted, safe_text
from medspark.track.store import experiment_name

__all__ = [
    "DatasetEntry", "Ending", "ModelEntry", "RunEntry", "Spool", "State", "Status", "read_state",
]  # fmt: skip

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
_STATE, _JOURNAL = "run.json", "journal"
# Opening a model calls its loader, so a run in a stranger's folder may only name medspark's.
Loader = Annotated[str, Field(pattern=r"^(medspark(\.\w+)+:\w+(\.\w+)*)?$")]


class DatasetEntry(Config):
    """The data that a run reads: name, digest of the manifest, and path."""

    name: str
    digest: str
    source: str


class ModelEntry(Config):
    """A model folder to log, and the medspark function ``module:name`` that loads it.

    ``input_shape`` is the shape of one input, without the batch; ``outputs`` is the number of
    classes.
    """

    folder: Path
    loader: Loader
    input_shape: tuple[int, ...]
    outputs: int
    file_loader: Loader = Field("", description="function that loads it for file inputs")
    classes: tuple[str, ...] = Field((), description="names of the classes' outputs")
    guarded: bool = Field(
        False, description="whether answers to files have columns of a guard, and arrays a p-value"
    )
    card: str = Field("", description="the model card, as Markdown")
    register_as: str | None = Field(None, description="name in the model registry")
    alias: str = Field("candidate", description="alias of the registered version")
    packages: tuple[str, ...] = Field(
        ("torch", "timm", "safetensors"), description="what its loader needs besides the usual"
    )


class RunEntry(Config):
    """The description of a run, known before it starts."""

    name: str
    config: dict[str, Any] = Field({}, description="resolved configuration")
    params: dict[str, Any] = Field({}, description="parameters besides the configuration")
    tags: dict[str, str] = Field({}, description="MLflow tags")
    dataset: DatasetEntry | None = None
    versions: dict[str, dict[str, str]] = Field({}, description="library versions, by package")


class Ending(Config):
    """The status, final metrics and files of a run that ended."""

    # NaN and infinity survive the round trip through JSON.
    model_config = ConfigDict(ser_json_inf_nan="constants")

    status: Status
    params: dict[str, Any] = Field({}, description="parameters known only after the run")
    summary: dict[str, float] = Field({}, description="metrics of the whole run")
    tags: dict[str, str] = Field({}, description="MLflow tags known only after the run")
    artifacts: Path | None = Field(None, description="folder of tables and plots, below the run's")
    model: ModelEntry | None = None


class State(Config):
    """Everything about a run except its journal."""

    entry: RunEntry
    uri: str = Field(description="MLflow tracking URI of the state below, without user info")
    experiment: str
    parent_run_id: str | None = None
    spool_id: str = Field("", description="finds the run in MLflow again if run_id is missing")
    run_id: str | None = Field(None, description="None until MLflow has accepted the run")
    described: bool = Field(False, description="MLflow has parameters, dataset, configuration")
    published: dict[str, int] = Field({}, description="last published step of each metric")
    ending: Ending | None = None
    model_uri: str | None = None
    registered: str | None = Field(None, description="models:/NAME@ALIAS, if registered")
    complete: bool = Field(False, description="MLflow has everything")


class Spool:
    """The folder of a run: its state, and the journal that rank 0 writes.

    ``uri`` is the store to publish to; it comes from the user, never from the folder. The folder
    keeps it without user info, to record which store has which parts.
    """

    def __init__(self, folder: Path, state: State, *, uri: str) -> None:
        self.folder = folder
        self.uri = uri
        self.state = _safe(state)
        if self.state.uri != safe_text(uri):
            self.state = _moved(self.state, uri)

    @classmethod
    def open(cls, folder: Path, new: State, *, uri: str) -> Spool:
        """Return the spool in ``folder``, or else a new one with the state ``new``."""
        (folder / _JOURNAL).mkdir(parents=True, exist_ok=True)
        if (folder / _STATE).exists():
            spool = cls.reopen(folder, uri=uri)
            spool.update(ending=None, complete=False, parent_run_id=new.parent_run_id)
            return spool
        spool = cls(folder, new, uri=uri)
        spool.update()
        return spool

    @classmethod
    def reopen(cls, folder: Path, *, uri: str) -> Spool:
        """Return the spool in ``folder``. Raises RunError if there is no readable one."""
        return cls(folder, read_state(folder), uri=uri)

    @property
    def journal(self) -> Path:
        """The folder of the journal."""
        return self.folder / _JOURNAL

    def keep(self, files: Path, name: str) -> Path:
        """Return the path of the folder ``files`` below the spool.

        If it lies elsewhere, it is copied there as ``name``. So the spool alone is enough to
        publish the run later, from any place.
        """
        root = self.folder.resolve()
        if files.resolve().is_relative_to(root):
            return files.resolve().relative_to(root)
        shutil.copytree(files, root / name, dirs_exist_ok=True)
        return Path(name)

    def own(self, files: Path) -> Path:
        """Return the full path of ``files``, a path below the spool, after checking its content.

        Raises RunError if a file in it lies outside the spool once symbolic links are resolved, or
        is not a regular file: it must not be published.
        """
        root, folder = self.folder.resolve(), self.folder / files
        for path in _with_all_below(folder):
            if not path.resolve().is_relative_to(root):
                raise RunError(
                    f"{path} lies outside {self.folder} and is not published: a run's files are "
                    "in its own folder."
                )
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise RunError(f"{path} is no file and is not published.")
        return folder

    def check(self) -> None:
        """Raise RunError if the run would publish files outside its folder."""
        ending = self.state.ending
        if ending is not None and ending.artifacts is not None:
            self.own(ending.artifacts)
        if ending is not None and ending.model is not None:
            self.own(ending.model.folder)

    def update(self, **changes: object) -> None:
        """Change the state in memory, and on disk atomically; an I/O error is only logged.

        Secrets are removed from both.
        """
        self.state = _safe(self.state.model_copy(update=changes))
        try:
            write_whole(self.folder / _STATE, self.state.model_dump_json(indent=1))
        except OSError as error:
            logger.warning("the state of the run could not be kept in %s: %s", self.folder, error)


def read_state(folder: Path) -> State:
    """Return the state of the run in ``folder``. Raises RunError if there is no readable one."""
    try:
        return State.model_validate_json(read_regular(folder / _STATE))
    except FileNotFoundError:
        raise RunError(f"{folder} holds no recorded run: there is no {_STATE}.") from None
    except OSError as error:
        raise RunError(f"{folder / _STATE} cannot be read: {error.strerror}.") from None
    except ValidationError as error:
        problem = first_problem(error)
        raise RunError(f"{folder / _STATE} is no record of a run: {problem}.") from None


def _safe(state: State) -> State:
    return State.model_validate(redacted(state.model_dump()))


def _moved(state: State, uri: str) -> State:
    """Return the state of the same run for the store ``uri``, which has nothing of it yet."""
    return State(
        entry=state.entry,
        uri=safe_text(uri),
        experiment=experiment_name(state.experiment, uri),
        ending=state.ending,
    )


def _with_all_below(folder: Path) -> Iterator[Path]:
    """Yield ``folder`` and every path below it, without following links to folders."""
    yield folder
    for place, folders, files in os.walk(folder):
        yield from (Path(place) / name for name in (*folders, *files))
