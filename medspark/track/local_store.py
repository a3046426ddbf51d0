"""Open an MLflow store; make a local one whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking import MlflowClient

__all__ = ["open_store"]

_PREFIX = "sqlite:///"


def open_store(uri: str) -> MlflowClient:
    """Return a client of the store at ``uri``. A new local store takes seconds to create."""
    if uri.startswith(_PREFIX) and "?" not in uri and not uri.endswith(":memory:"):
        _create(Path(uri.removeprefix(_PREFIX)))
    return MlflowClient(uri)


def _create(database: Path) -> None:
    """Create the tables of a new database beside its place, then give it its name.

    MLflow creates them in tens of steps, and two processes do so at once. A process that is
    killed meanwhile leaves a database that MLflow can never open again.
    """
    if database.exists():
        return
    fresh = database.with_name(f".{database.name}.{uuid.uuid4().hex}")
    try:
        artifacts = (database.parent / "artifacts").resolve().as_uri()
        store = SqlAlchemyStore(f"{_PREFIX}{fresh}", artifacts)  # type: ignore[no-untyped-call]
        store.engine.dispose()  # closes the file, so that all of it is on disk
        _name(fresh, database)
    finally:
        for part in database.parent.glob(f"{fresh.name}*"):
            part.unlink()


def _name(fresh: Path, database: Path) -> None:
    """Name the database, unless another process was first."""
    try:
        os.link(fresh, database)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        if not database.exists():
            fresh.rename(database)
