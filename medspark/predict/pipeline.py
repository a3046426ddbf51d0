"""Apply a model to an archive: list, answer what is new, settle, commit."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from medspark import ownership, storage
from medspark.errors import RunError
from medspark.ingest.labels import BETWEEN_FINDINGS
from medspark.ingest.listing import ANNOTATED, Annotate, listing
from medspark.ingest.quarantine import Row, write_private
from medspark.ingest.reading import ArchiveReader
from medspark.ingest.sample_set import new_generation
from medspark.lock import locked
from medspark.predict.answer_task import DONE, AnswerFiles, Model
from medspark.predict.archive import Asked
from medspark.predict.folder import OUTCOMES, QUARANTINE, PredictionManifest
from medspark.spark.progress import followed
from medspark.spark.session import task_errors
from medspark.spark.tables import staged, write_files
from medspark.spark.task import map_batches, tasks_for

__all__ = ["predict"]

_LOGGER = logging.getLogger(__name__)

_SAME = ["file_key", "fingerprint"]
# A task that ends late keeps one core busy and the others idle.
_TASKS_PER_CORE = 8


def predict(spark: SparkSession, asked: Asked, model: Model) -> dict[str, Any]:
    """Answer the files of the archive that have no answer yet, and return counts of all outcomes.

    ``files_found = answered + quarantined`` counts each file once. What the tasks of a killed job
    had finished is kept. Raises UsageError if another job holds the folder, and RunError if a task
    fails for a reason other than its files.
    """
    folder = asked.folder
    ownership.claim(folder.url, "predictions")
    with locked(folder.url) as is_held, task_errors():
        asked.check_same()
        folder.commit(asked.manifest)
        folder.clean_staging()
        folder.clean_generations()
        storage.make_folder(folder.path("work"))
        try:
            return _Prediction(spark, asked, model).run()
        finally:
            if is_held():
                folder.clean_staging()
                folder.clean_generations()


class _Prediction:
    """One prediction, step by step."""

    def __init__(self, spark: SparkSession, asked: Asked, model: Model) -> None:
        self._spark, self._asked, self._model = spark, asked, model
        self._folder, self._generation = asked.folder, new_generation()
        self._before = asked.manifest

    def run(self) -> dict[str, Any]:
        """Run the prediction and return its result document."""
        files = self._listed()
        found = files.count()
        todo, new = files, found
        if names := self._known_names():
            known = self._read(names).select(_SAME)
            todo = self._staged("todo", files.join(known, _SAME, "left_anti"))
            new = todo.count()
        began = time.monotonic()
        pieces = self._answer(todo, new)
        seconds = time.monotonic() - began
        manifest = self._before
        if self._is_news(found):
            if set(pieces) - set(self._folder.pieces()):
                raise self._apart(found)
            manifest = self._settled(found, self._once(files) if names else self._read(pieces))
        result = {"files_found": found} | self._outcomes(manifest)
        if found != result["answered"] + result["quarantined"]:
            raise self._apart(found)
        if manifest is not self._before:
            self._folder.commit(manifest)
            self._folder.clean_pieces()
        return (
            result
            | {"done_before": found - new, "done_now": new, "seconds": seconds}
            | {"images_per_second": new / seconds if new else None}
            | {"answers": self._folder.path("answers", str(manifest.generation))}
            | self._private(manifest)
        )

    def _apart(self, found: int) -> RunError:
        return RunError(
            f"{self._folder.url} does not hold one row for each of the {found} files; the workers "
            "may not share the folder."
        )

    def _listed(self) -> DataFrame:
        asked, config = self._asked, self._asked.config
        found = listing(
            self._spark, asked.source, inventory=config.inventory, limits=config.limits
        ).select("path", "size", "modified")
        keyed = Annotate(asked.source, asked.pseudonyms, config.privacy, by_folder=False)
        files = map_batches(found, keyed, from_arrow_schema(ANNOTATED))
        return self._staged("files", files.select(*_SAME, "sealed_path", "size"))

    def _known_names(self) -> tuple[str, ...]:
        """Return the files of the last commit, and those of tasks that finished after it."""
        return (*self._before.answers, *self._before.quarantine, *self._folder.pieces())

    def _answer(self, todo: DataFrame, count: int) -> list[str]:
        """Answer the files ``todo``; return the pieces that hold a row for each of them."""
        asked, config = self._asked, self._asked.config
        if count == 0:
            return []
        reader = ArchiveReader(
            source=asked.source,
            run=self._generation,
            rendering=asked.model.rendering,
            limits=config.limits,
            privacy=config.privacy,
            pseudonyms=asked.pseudonyms,
            guarded=config.guarded,
        )
        task = AnswerFiles(reader, self._model, self._folder.url, config.batch_size)
        spread = todo.repartition(tasks_for(self._spark, count, per_core=_TASKS_PER_CORE))
        earlier = self._folder.finished()
        with followed(
            lambda: self._folder.finished() - earlier, total=count, unit="file", doing="answered"
        ):
            # Of a task that ran twice, Spark returns one report.
            return [row["piece"] for row in map_batches(spread, task, DONE).collect()]

    # --- settling ---

    def _is_news(self, found: int) -> bool:
        """Return whether the last commit differs from what is there now."""
        before = self._before
        return before.generation is None or before.files != found or bool(self._folder.pieces())

    def _read(self, names: Sequence[str]) -> DataFrame:
        return self._folder.read(self._spark, names)

    def _once(self, files: DataFrame) -> DataFrame:
        """Return one of the known rows of each of ``files``.

        A task that was killed with its job may have left rows that another wrote again. Answers
        come before failures, which may have been a matter of time or memory.
        """
        first = Window.partitionBy("file_key").orderBy(
            F.col("reason").asc_nulls_first(), "message", "probability"
        )
        return (
            self._read(self._known_names())
            .join(files.select(_SAME), _SAME, "left_semi")
            .select(*OUTCOMES.names, F.row_number().over(first).alias("rank"))
            .where(F.col("rank") == 1)
            .persist()  # it is written in two parts
        )

    def _settled(self, found: int, rows: DataFrame) -> PredictionManifest:
        """Write ``rows``, one for each file; return the manifest that would commit them."""
        answered, failed = rows.where(F.col("reason").isNull()), F.col("reason").isNotNull()
        kept = [name for name in OUTCOMES.names if name not in ("reason", "message")]
        written = {
            "answers": self._written("answers", answered.select(kept)),
            "quarantine": self._written("quarantine", rows.where(failed).select(*QUARANTINE)),
        }
        rows.unpersist()
        more = {"generation": self._generation, "files": found}
        return self._before.model_copy(update=more | written)

    def _written(self, table: str, rows: DataFrame) -> tuple[str, ...]:
        place = self._folder.path(table, self._generation)
        files = write_files(rows, place)
        if files is None:
            return self._folder.written(table, self._generation)
        return tuple(url.removeprefix(f"{self._folder.url}/") for url in files)

    def _staged(self, name: str, rows: DataFrame) -> DataFrame:
        return staged(rows, self._folder.path("staging", name))

    # --- what to say ---

    def _outcomes(self, manifest: PredictionManifest) -> dict[str, Any]:
        files = (*manifest.answers, *manifest.quarantine)
        rows = self._read(files).groupBy("label", "reason").count().collect()
        reasons = {row["reason"]: row["count"] for row in rows if row["reason"] is not None}
        counts = {row["label"]: row["count"] for row in rows if row["reason"] is None}
        labels = Counter(dict.fromkeys(manifest.classes, 0))
        for label, count in counts.items():
            names = label.split(BETWEEN_FINDINGS) if manifest.multi_label else [label]
            labels.update({name: count for name in names if name})
        return {
            "answered": sum(counts.values()),
            "quarantined": sum(reasons.values()),
            "quarantine_reasons": dict(sorted(reasons.items())),
            "labels": dict(labels),
        }

    # --- the private lists ---

    def _private(self, manifest: PredictionManifest) -> dict[str, Any]:
        """Write the private lists of paths; return where they are."""
        asked = self._asked
        paths = self._paths() if manifest.quarantine else ()
        listed = asked.quarantined.renewed(self._failed(manifest), known=paths)
        try:
            write_private(asked.paths, ("file_key", "path"), self._paths())
            written = str(asked.paths)
        except OSError as error:
            _LOGGER.warning("The files are not listed: %s", error)
            written = None
        return {"quarantine_file": listed, "paths_file": written}

    def _failed(self, manifest: PredictionManifest) -> Iterator[Row]:
        """Yield the rows of the quarantine, without paths."""
        for row in self._read_here(manifest.quarantine, ("file_key", "reason", "message")):
            yield row["file_key"], None, row["reason"], row["message"]

    def _paths(self) -> Iterator[tuple[str, str]]:
        """Yield the key and the absolute path of each file."""
        source, pseudonyms = self._asked.source, self._asked.pseudonyms
        names = self._folder.written("staging", "files")
        for row in self._read_here(names, ("file_key", "sealed_path")):
            yield row["file_key"], storage.join(source, pseudonyms.unseal(row["sealed_path"]))

    def _read_here(self, names: Sequence[str], columns: Sequence[str]) -> Iterator[dict[str, str]]:
        """Yield the rows of Parquet files of the folder, read here and not by Spark."""
        for name in names:
            system, path = storage.filesystem(self._folder.path(name))
            with system.open(path, "rb") as file:
                for batch in pq.ParquetFile(file).iter_batches(columns=list(columns)):
                    yield from batch.to_pylist()
