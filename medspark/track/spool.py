"""The spool of a run: a folder that says what the run is, how far it is published, how it ended."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from medspark.config import Config
from medspark.errors import RunError

__all__ = ["DatasetEntry", "Ending", "ModelEntry", "RunEntry", "Spool", "State", "Status"]

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
_STATE, _JOURNAL = "run.json", "journal"


class DatasetEntry(Config):
    """The data that a run reads: name, digest of the manifest, and path."""

    name: str
    digest: str
    source: str


class ModelEntry(Config):
    """A model folder to log, and the function ``module:name`` that loads it as a callable.

    ``input_shape`` is that of one input, without the batch; ``outputs`` the number of classes.
    """

    folder: Path
    loader: str
    input_shape: tuple[int, ...]
    outputs: int
    file_loader: str = Field("", description="function that loads it as one that answers files")
    classes: tuple[str, ...] = Field((), description="names of the outputs")
    card: str = Field("", description="the model card, as Markdown")
    register_as: str | None = Field(None, description="name in the model registry")
    alias: str = Field("candidate", description="of the version that is registered")


class RunEntry(Config):
    """What a run is, before it starts."""

    name: str
    config: dict[str, Any] = Field({}, description="resolved configuration")
    params: dict[str, Any] = Field({}, description="parameters beside the configuration")
    tags: dict[str, str] = Field({}, description="MLflow tags")
    dataset: DatasetEntry | None = None
    versions: dict[str, dict[str, str]] = Field({}, description="of the libraries, by package")


class Ending(Config):
    """How a run ended, and what it leaves."""

    status: Status
    params: dict[str, Any] = Field({}, description="parameters that only the run could tell")
    summary: dict[str, float] = Field({}, description="metrics of the whole run")
    tags: dict[str, str] = Field({}, description="MLflow tags that only the run could tell")
    artifacts: Path | None = Field(None, description="folder of tables and plots")
    model: ModelEntry | None = None


class State(Config):
    """Everything that is known of a run apart from its journal."""

    entry: RunEntry
    uri: str = Field(description="MLflow tracking URI")
    experiment: str
    parent_run_id: str | None = None
    run_id: str | None = Field(None, description="None until MLflow has taken the run")
    described: bool = Field(False, description="parameters, dataset and configuration are there")
    published: dict[str, int] = Field({}, description="last step of each metric that is there")
    ending: Ending | None = None
    model_uri: str | None = None
    registered: str | None = Field(None, description="models:/NAME@ALIAS, where it was asked for")
    complete: bool = Field(False, description="MLflow has everything")


class Spool:
    """The folder: its state, and the journal that rank 0 writes."""

    def __init__(self, folder: Path, state: State) -> None:
        self.folder = folder
        self.state = state

    @classmethod
    def open(cls, folder: Path, new: State) -> Spool:
        """Return the spool that ``folder`` holds, or one that begins with ``new``."""
        (folder / _JOURNAL).mkdir(parents=True, exist_ok=True)
        if (folder / _STATE).exists():
            spool = cls.reopen(folder)
            spool.update(ending=None, complete=False)
            return spool
        spool = cls(folder, new)
        spool.update()
        return spool

    @classmethod
    def reopen(cls, folder: Path) -> Spool:
        """Return the spool in ``folder``. Raises RunError where there is none."""
        try:
            text = (folder / _STATE).read_text(encoding="utf-8")
        except OSError:
            raise RunError(f"{folder} holds no recorded run: there is no {_STATE}.") from None
        return cls(folder, State.model_validate_json(text))

    @property
    def journal(self) -> Path:
        """The folder of the journal."""
        return self.folder / _JOURNAL

    def update(self, **changes: object) -> None:
        """Change the state, in memory at once and on disk atomically if the disk lets us."""
        self.state = self.state.model_copy(update=changes)
        scratch = self.folder / f".{_STATE}.partial"
        try:
            scratch.write_text(self.state.model_dump_json(indent=1), encoding="utf-8")
            os.replace(scratch, self.folder / _STATE)
        except OSError as error:
            logger.warning("the state of the run could not be kept in %s: %s", self.folder, error)
