"""Track one MLflow run per training: recorded in a folder first, and published from there.

The folder (a *spool*) is the source of truth: description, journal and ending of the run.
``publish`` brings MLflow up to date: live while training runs, again after a tracking server was
unreachable, or days later (``python -m medspark.track FOLDER``). So a server that is down costs no
training step and no metric, and a resumed run continues under the run id in its spool.
"""

from __future__ import annotations

import functools
import logging
import shlex
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medspark.errors import RunError
from medspark.redact import safe_text
from medspark.track.config import TrackConfig
from medspark.track.journal import JournalReader
from medspark.track.spool import Ending, ModelEntry, RunEntry, Spool, State, Status
from medspark.track.store import experiment_name, first_line, tracking_uri
from medspark.versions import of_process

if TYPE_CHECKING:
    from medspark.track.publisher import Publisher

__all__ = ["TrackedRun", "tracked"]

logger = logging.getLogger(__name__)

# The longest that MLflow waits for the first step of a training.
_RECORD_SECONDS = 60.0


class TrackedRun:
    """One run: its spool on disk, and the thread that publishes it while it grows."""

    def __init__(
        self, spool: Spool, *, system_metrics: bool = False, after_first_record: bool = False
    ) -> None:
        self.spool = spool
        self._waits = after_first_record
        self._away = False
        self._lock = threading.Lock()
        self._system_metrics = system_metrics
        self._offered = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mlflow", daemon=True)

    @functools.cached_property
    def _publisher(self) -> Publisher:
        # Imported in the background, because MLflow takes seconds to import.
        from medspark.track.publisher import Publisher

        return Publisher(self.spool)

    @property
    def reference(self) -> dict[str, str | None]:
        """The place of the run in MLflow; ``run_id`` is None if MLflow has not accepted it.

        Waits for the first attempt to publish.
        """
        if self._thread.is_alive():
            self._offered.wait()
        state = self.spool.state
        return {
            "run_id": state.run_id,
            "uri": state.uri,
            "experiment": state.experiment,
            "model": state.model_uri,
            "registered": state.registered,
        }

    def charts_of_children(self, *, order_by: str) -> str:
        """Return the URL, relative to the server's, of charts that compare this run's children.

        MLflow shows the children of a run side by side only if they are sorted by a metric.
        Returns "" while MLflow does not have the run.
        """
        return "" if self.spool.state.run_id is None else self._publisher.charts(order_by)

    def start(self) -> None:
        """Begin to publish in the background, so that training does not wait for MLflow."""
        self._thread.start()

    def end(
        self,
        status: Status,
        *,
        params: Mapping[str, Any] | None = None,
        summary: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        artifacts: Path | None = None,
        model: ModelEntry | None = None,
        patience_seconds: float = 20.0,
    ) -> None:
        """Publish the rest, ``summary`` at step 0, the files in ``artifacts``, and ``model``."""
        self._halt()
        ending = Ending(
            status=status,
            params=dict(params or {}),
            summary=dict(summary or {}),
            tags=dict(tags or {}),
            artifacts=self._kept(artifacts, "artifacts"),
            model=self._kept_model(model),
        )
        self.spool.update(ending=ending)
        deadline = time.monotonic() + patience_seconds
        while not self.publish() and time.monotonic() < deadline:
            time.sleep(1)
        if not self.spool.state.complete:
            logger.warning(
                "MLflow at %s has not taken the run; nothing is lost, publish it later with: "
                "python -m medspark.track --uri %s %s",
                self.spool.state.uri,
                shlex.quote(self.spool.state.uri),
                shlex.quote(str(self.spool.folder)),
            )

    def publish(self) -> bool:
        """Bring MLflow up to date with the spool; return whether it took everything."""
        with self._lock:
            try:
                self._publisher.publish()
            except Exception as error:  # any exception of a store means that it is unreachable
                if not self._away:
                    ours = isinstance(error, RunError)
                    away = f"MLflow is away, training goes on: {first_line(error)}"
                    logger.warning("%s", error if ours else away)
                    logger.debug("the exception of MLflow's store", exc_info=error)
                self._away = True
                return False
            if self._away:
                logger.warning("MLflow is back")
            self._away = False
            return True

    def _follow(self) -> None:
        try:
            if self._waits:
                self._wait_for_a_record()
            self.publish()
        finally:
            self._offered.set()
        watched = self._system_metrics and self.spool.state.run_id is not None
        with self._publisher.watching_machine() if watched else nullcontext():
            while not self._stop.wait(2.0):
                self.publish()

    def _wait_for_a_record(self) -> None:
        """Wait until the journal has a record, for a minute at most, or until the run ends."""
        reader, deadline = JournalReader(self.spool.journal), time.monotonic() + _RECORD_SECONDS
        while next(reader.poll(), None) is None and time.monotonic() < deadline:
            if self._stop.wait(0.25):
                return

    def _kept(self, files: Path | None, name: str) -> Path | None:
        if files is None or not files.is_dir():
            return None
        try:
            return self.spool.keep(files, name)
        except OSError as error:
            logger.warning("MLflow gets nothing of %s, which cannot be copied: %s", files, error)
            return None

    def _kept_model(self, model: ModelEntry | None) -> ModelEntry | None:
        folder = self._kept(model.folder, "model") if model else None
        return model.model_copy(update={"folder": folder}) if model and folder else None

    def _halt(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()


@contextmanager
def tracked(
    folder: Path, config: TrackConfig, entry: RunEntry, *, after_first_record: bool = False
) -> Iterator[TrackedRun]:
    """Record the block as one run, which the block ends; an exception ends it as FAILED.

    If ``folder`` holds the spool of an interrupted run, that run continues. With
    ``after_first_record`` MLflow is told first when there is a record: its import takes seconds
    of a core, which starting ranks need.
    """
    uri = tracking_uri(config.uri)
    state = State(
        entry=entry.model_copy(
            update={"name": config.run_name or entry.name, "versions": of_process()}
        ),
        uri=safe_text(uri),
        experiment=experiment_name(config.experiment, uri),
        parent_run_id=config.parent_run_id,
    )
    run = TrackedRun(
        Spool.open(folder, state, uri=uri),
        system_metrics=config.system_metrics,
        after_first_record=after_first_record,
    )
    run.start()
    try:
        yield run
    except KeyboardInterrupt:
        run.end("KILLED")
        raise
    except BaseException as error:  # record the run as failed, then re-raise
        why = {"medspark.error": f"{type(error).__name__}: {first_line(error)}"}
        run.end("FAILED", tags=why, patience_seconds=config.patience_seconds)
        raise
